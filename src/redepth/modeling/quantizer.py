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
from .quantization import (
    ADAPTER,
    ADAPTER_BITS,
    DYNAMIC_PARTS,
    GROUPS,
    METHOD,
    QUANTIZATIONS,
    WEIGHT_ONLY,
    DepthQuantization,
)
from .quantized_linear import HalfHead, QuantizedLinear
from .quantized_weights import stored_shapes


class DepthQuantizationConfig(DepthQuantization, QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization.DepthQuantization`, which says what each argument means, as transformers reads and writes it."""

    @classmethod
    def named(cls, name: str) -> "DepthQuantizationConfig":
        """One of QUANTIZATIONS by its name.

        Raises:
            ValueError: for another.
        """
        if name not in QUANTIZATIONS:
            raise UserError(f"unknown quantization {name!r}; use {', '.join(QUANTIZATIONS)}")
        return cls(**QUANTIZATIONS[name])


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

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


# The code inside a checkpoint may be loaded beside redepth itself; the first of them serves both.
if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(METHOD)(DepthQuantizationConfig)
    register_quantizer(METHOD)(DepthQuantizer)
