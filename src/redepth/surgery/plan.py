"""Which source layers go where, decided before any tensor is read."""

import re
from dataclasses import dataclass

from redepth.errors import RedepthError

# How a conversion starts unless told otherwise: docs/conversion.md has the measurements.
DEFAULT_ADAPTER = "blend:0.125"
DEFAULT_STATE = "embed"
STATES = ("embed", "noise", "zeros", "skip-adapter")
GROUPS = ("prelude", "core", "coda")


@dataclass(frozen=True)
class Plan:
    """The source layers that become prelude, core and coda, by their index, out of `num_layers`."""

    prelude: tuple[int, ...]
    core: tuple[int, ...]
    coda: tuple[int, ...]
    num_layers: int

    @property
    def layers(self) -> tuple[int, ...]:
        """The kept source layers in the order in which they run."""
        return self.prelude + self.core + self.coda

    @property
    def dropped(self) -> tuple[int, ...]:
        return tuple(layer for layer in range(self.num_layers) if layer not in self.layers)

    @property
    def is_full_cover(self) -> bool:
        """Whether every source layer is kept, in order."""
        return self.layers == tuple(range(self.num_layers))

    def full_cover(self) -> "Plan":
        """The same core with every layer before it as prelude and every layer after it as coda."""
        start, stop = self.core[0], self.core[-1] + 1
        everything = tuple(range(self.num_layers))
        return Plan(everything[:start], everything[start:stop], everything[stop:], self.num_layers)

    def with_two_layers_swapped(self) -> "Plan":
        """The same plan with two layers exchanged, a wrong surgery that verification must notice."""
        order = list(self.layers)
        middle = max(len(order) // 2, 1)
        order[middle - 1], order[middle] = order[middle], order[middle - 1]
        first, second = len(self.prelude), len(self.prelude) + len(self.core)
        return Plan(tuple(order[:first]), tuple(order[first:second]), tuple(order[second:]), self.num_layers)

    def slices(self) -> dict[str, str]:
        """The three groups as Python slices, comma-separated where layers are left out between them."""
        return {group: _as_slice(getattr(self, group)) for group in GROUPS}

    def __str__(self) -> str:
        return ", ".join(f"{group} {text}" for group, text in self.slices().items())


def _as_slice(layers: tuple[int, ...]) -> str:
    if not layers:
        return "0:0"
    starts = [i for i, layer in enumerate(layers) if i == 0 or layer != layers[i - 1] + 1]
    runs = [layers[start:stop] for start, stop in zip(starts, [*starts[1:], len(layers)], strict=True)]
    return ",".join(f"{run[0]}:{run[-1] + 1}" for run in runs)


def _parse_layers(group: str, text: str, num_layers: int) -> tuple[int, ...]:
    layers: tuple[int, ...] = ()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d*)\s*:\s*(-?\d*)\s*", part)
        if match is None:
            raise RedepthError(
                f"--{group} {text!r} is not a range of layers; write it as START:STOP, such as 4:10 or 4:7,8:10"
            )
        start, stop = (int(bound) if bound else None for bound in match.groups())
        for bound in (start, stop):
            if bound is not None and not -num_layers <= bound <= num_layers:
                raise RedepthError(
                    f"--{group} {text} reaches layer {bound}, but the source has {num_layers} layers (0 to {num_layers - 1})"
                )
        layers += tuple(range(num_layers)[start:stop])
    return layers


def default_plan(num_layers: int) -> Plan:
    """Every layer kept; the middle fifth of them is the core.

    On SmolLM2-135M such plans start almost unhurt at every depth, while plans that drop layers start several nats up.
    """
    length = max(round(num_layers / 5), 1)
    start = (num_layers - length) // 2
    layers = tuple(range(num_layers))
    return Plan(layers[:start], layers[start : start + length], layers[start + length :], num_layers)


def make_plan(num_layers: int, prelude: str | None = None, core: str | None = None, coda: str | None = None) -> Plan:
    """The plan for ranges written as Python slices, several with commas; the default plan if none is given.

    A core alone is enough: the layers before it become the prelude and those after it the coda.

    Raises:
        RedepthError: for a range out of bounds, an empty core, or groups that overlap or are out of order.
    """
    if core is None:
        if prelude is not None or coda is not None:
            raise RedepthError("--prelude and --coda need --core too; give the layers to loop, such as --core 10:16")
        return default_plan(num_layers)
    core_layers = _parse_layers("core", core, num_layers)
    if not core_layers:
        raise RedepthError(f"--core {core} holds no layer; the core needs at least one")
    prelude_layers = tuple(range(core_layers[0])) if prelude is None else _parse_layers("prelude", prelude, num_layers)
    coda_layers = (
        tuple(range(core_layers[-1] + 1, num_layers)) if coda is None else _parse_layers("coda", coda, num_layers)
    )
    plan = Plan(prelude_layers, core_layers, coda_layers, num_layers)
    if list(plan.layers) != sorted(set(plan.layers)):
        raise RedepthError(
            f"plan {plan} uses layers twice or out of order; prelude, core and coda must follow each other"
        )
    return plan
