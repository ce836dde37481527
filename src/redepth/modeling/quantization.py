"""How a model may be quantised: the choices and their checks, without torch and transformers."""

from typing import Any

from .errors import UserError

WEIGHT_ONLY, DYNAMIC = "weight-only", "dynamic"
METHOD = "redepth"
KINDS = (DYNAMIC, WEIGHT_ONLY)
# Parts of the stack that are quantised, by the name of the choice.
GROUPS = {"core": ("adapter", "core_block"), "all": ("prelude", "adapter", "core_block", "coda")}
# The parts whose activations may be rounded: some first and last layers have activations so large that nothing is left of
# the others.
DYNAMIC_PARTS = ("core_block",)
# An adapter is the identity, scaled, and small numbers beside it, which a scale for a whole row would round away.
ADAPTER, ADAPTER_BITS = "adapter", 16
DEFAULT_GROUP_SIZE = 32


class DepthQuantization:
    """How a depth-recurrent model is quantised.

    Args:
        bits: 8 or 4, of each weight.
        kind: `dynamic` computes the core's products in 8 bits, activations rounded token by token, and leaves the
            activations of all other layers as they are; `weight-only` leaves all. 4 bits are weight-only.
        groups: `core`, with its adapter; or `all` layers, and beside them the head, whose product then reads an fp16 copy.
        group_size: in 4 bits, how many inputs share a scale; an even number.

    Raises:
        ValueError: for anything else.
    """

    def __init__(
        self,
        bits: int = 8,
        kind: str | None = None,
        groups: str = "core",
        group_size: int = DEFAULT_GROUP_SIZE,
        quant_method: str = METHOD,
    ) -> None:
        self.quant_method = METHOD
        self.bits = bits
        self.kind = kind if kind is not None else (DYNAMIC if bits == 8 else WEIGHT_ONLY)
        self.groups = groups
        self.group_size = group_size
        for name, known in (("bits", (8, 4)), ("kind", KINDS), ("groups", tuple(GROUPS))):
            value = getattr(self, name)
            if isinstance(value, bool) or value not in known:
                raise UserError(f"quantisation has {name}={value!r}; use {' or '.join(map(str, known))}")
        if bits == 4 and self.kind == DYNAMIC:
            raise UserError("quantisation to 4 bits is weight-only; use 8 bits, or kind='weight-only'")
        if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 2 or group_size % 2:
            raise UserError(f"quantisation has group_size={group_size!r}; use an even number, such as 32")

    def __str__(self) -> str:
        where = "the core" if self.groups == "core" else "all layers"
        return f"{self.bits} bits, {self.kind}, {where}"


QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8, "kind": DYNAMIC},
    "int8-weight-only": {"bits": 8, "kind": WEIGHT_ONLY},
    "int4": {"bits": 4, "kind": WEIGHT_ONLY},
}
