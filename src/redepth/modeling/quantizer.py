"""transformers' door to quantised checkpoints: the configuration in config.json, and what reads it when a model is loaded."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .errors import UserError
from .quantized_linear import DYNAMIC, WEIGHT_ONLY, HalfHead, QuantizedLinear
from .quantized_weights import stored_shapes

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


class DepthQuantizationConfig(QuantizationConfigMixin):
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
        self.quant_method = METHOD  # type: ignore[assignment]
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

    @classmethod
    def named(cls, name: str) -> "DepthQuantizationConfig":
        """One of QUANTIZATIONS by its name.

        Raises:
            ValueError: for another.
        """
        if name not in QUANTIZATIONS:
            raise UserError(f"unknown quantization {name!r}; use {', '.join(QUANTIZATIONS)}")
        return cls(**QUANTIZATIONS[name])

    def __str__(self) -> str:
        where = "the core" if self.groups == "core" else "all layers"
        return f"{self.bits} bits, {self.kind}, {where}"


QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8, "kind": DYNAMIC},
    "int8-weight-only": {"bits": 8, "kind": WEIGHT_ONLY},
    "int4": {"bits": 4, "kind": WEIGHT_ONLY},
}


def linears(model: Any, config: DepthQuantizationConfig) -> Iterator[tuple[str, nn.Linear, dict[str, Any]]]:
    """The layers to quantise: name in the model, layer, and `kind`, `bits` and `group_size`.

    Raises:
        ValueError: for a model that is not recurrent in depth.
    """
    stack = model.base_model
    if not hasattr(stack, "core_block"):
        raise UserError(f"redepth quantises models recurrent in depth, not a {type(model).__name__}; convert it first")
    prefix = "" if stack is model else f"{model.base_model_prefix}."
    for part in GROUPS[config.groups]:
        how = {
            "kind": config.kind if part in DYNAMIC_PARTS else WEIGHT_ONLY,
            "bits": ADAPTER_BITS if part == ADAPTER else config.bits,
            "group_size": config.group_size,
        }
        for name, module in stack.get_submodule(part).named_modules(prefix=prefix + part):
            if isinstance(module, nn.Linear):
                yield name, module, how


def quantized_tensors(model: Any, config: DepthQuantizationConfig) -> set[str]:
    """Names of the tensors that a checkpoint stores quantised, whatever its dtype.

    Args:
        model: of the checkpoint's configuration, not quantised; its weights don't matter.
    """
    return {
        f"{name}.{tensor}"
        for name, _, how in linears(model, config)
        for tensor in stored_shapes(how["bits"], 1, 1, how["group_size"])
    }


def halve_head(model: Any, config: DepthQuantizationConfig) -> None:
    """The head of a model whose groups are `all`; its weights in a checkpoint stay what they are."""
    head = getattr(model, "lm_head", None)
    if config.groups == "all" and isinstance(head, nn.Linear) and not isinstance(head, HalfHead):
        model.lm_head = HalfHead(head)


def quantize_model(model: Any, config: DepthQuantizationConfig) -> None:
    """Quantise a loaded model in place, one layer after another.

    Raises:
        ValueError: for a model that can't be, or that is quantised already.
    """
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise UserError("the model is quantised already; start from the unquantised checkpoint")
    for name, linear, how in list(linears(model, config)):
        quantized = QuantizedLinear.of(linear, **how)
        quantized.pack()
        model.set_submodule(name, quantized)
    halve_head(model, config)
    model.config.quantization_config = config


class DepthQuantizer(HfQuantizer):
    """Quantises a checkpoint as it is loaded, or loads one that was stored quantised."""

    quantization_config: DepthQuantizationConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise UserError("quantised layers can't be left on disk; choose a device_map without it")

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            return
        config = self.quantization_config
        for name, linear, how in list(linears(model, config)):
            shape = (linear.in_features, linear.out_features, linear.bias is not None)
            with torch.device("meta"):
                empty = QuantizedLinear(*shape, dtype=linear.weight.dtype, **how)
            model.set_submodule(name, empty)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            quantize_model(model, self.quantization_config)
            return
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.pack()
        halve_head(model, self.quantization_config)

    def is_serializable(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_trainable(self) -> bool:
        return False


# The code inside a checkpoint may be loaded beside redepth itself; the first of them serves both.
if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(METHOD)(DepthQuantizationConfig)
    register_quantizer(METHOD)(DepthQuantizer)
