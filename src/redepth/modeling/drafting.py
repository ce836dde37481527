"""The model that drafts for self-speculative decoding: the model itself, or its twin with narrow weights.

A draft costs what it takes to read the weights of prelude, core and coda once a token. In 8 bits they are a fraction of that,
and what the twin gets wrong the deep pass, whose weights stay as they are, only refuses.

Shapes: M tokens, K inputs, N outputs, V vocabulary.
"""

import copy
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F

from .few_tokens import product
from .quantization import DEFAULT_GROUP_SIZE, DYNAMIC_PARTS, WEIGHT_ONLY
from .quantized_linear import DynamicInt8, Half, PackedInt8, QuantizedLinear, best_time
from .quantized_weights import quantize

# The adapter stays as it is: an identity, scaled, and small numbers beside it, which a scale for a whole row would round away.
NARROWED = ("prelude", "core_block", "coda")
SHORTLIST = 64  # likely tokens whose logits are computed anew with the head's own weights

Product = Callable[[torch.Tensor], torch.Tensor]


def in_half(weight: torch.Tensor) -> Product:
    """Products with weights `[N, K]` in fp16, in the inputs' dtype."""
    return Half(quantize(weight, 16, DEFAULT_GROUP_SIZE), weight.shape[1], weight.dtype)


def in_int8(weight: torch.Tensor) -> Product:
    """The same with weights in 8 bits, over activations in bf16."""
    packed = PackedInt8(quantize(weight, 8, DEFAULT_GROUP_SIZE), weight.shape[1], torch.bfloat16)
    return lambda x: packed(x.bfloat16()).to(x.dtype)


def dynamic(weight: torch.Tensor) -> Product:
    """The same with weights and activations in 8 bits: for parts whose activations bear it."""
    return DynamicInt8(quantize(weight, 8, DEFAULT_GROUP_SIZE), weight.shape[1], weight.dtype)


def unchanged(weight: torch.Tensor) -> Product:
    """The same with the weights as they are."""
    return partial(F.linear, weight=weight)


@lru_cache
def fastest(
    outputs: int, inputs: int, dtype: torch.dtype, rounds_activations: bool, threads: int
) -> Callable[[torch.Tensor], Product]:
    """What makes the fastest products of that shape over one token on this processor.

    Args:
        rounds_activations: whether `dynamic` may.
        threads: how many torch uses, on which the answer depends.
    """
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)).to(dtype)
    x, products = weight[:1].clone(), {}
    for make in (unchanged, in_half, in_int8, *([dynamic] if rounds_activations else [])):
        try:
            products[make] = make(weight)
            products[make](x)
        except (RuntimeError, AttributeError):  # not built for this processor, or not for this shape
            products.pop(make, None)
    return min(products, key=lambda make: best_time(products[make], x))


class NarrowLinear(nn.Module):
    """A linear layer by its `fastest` products, or by given ones: `[…, K]` → `[…, N]`."""

    def __init__(self, linear: nn.Linear, rounds_activations: bool, products: Product | None = None) -> None:
        super().__init__()
        self.bias = linear.bias
        if products is None:
            weight = linear.weight.detach()
            make = fastest(*weight.shape, weight.dtype, rounds_activations, torch.get_num_threads())
            products = make(weight)
        self.product = products

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.product(x.reshape(-1, x.shape[-1])).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


class NarrowHead(NarrowLinear):
    """A head by its `fastest` products; the logits of a few likely tokens come from its own weights."""

    def __init__(self, head: nn.Linear, by_kernels: bool) -> None:
        products = partial(product, in_8_bits(head)) if by_kernels else None
        super().__init__(head, rounds_activations=True, products=products)
        self.weight = head.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[…, K]` → `[…, V]`."""
        logits = super().forward(x)
        likely = logits.topk(min(SHORTLIST, logits.shape[-1]), dim=-1, sorted=False).indices
        return logits.scatter_(-1, likely, (self.weight[likely] @ x[..., None])[..., 0])


# Twins by model, each with what its model's weights were when it was made.
_TWINS: WeakKeyDictionary[nn.Module, tuple[Any, nn.Module]] = WeakKeyDictionary()


def _linears(stack: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for part in NARROWED:
        for name, module in stack.get_submodule(part).named_modules(prefix=part):
            if isinstance(module, nn.Linear):
                yield name, module


def drafter_of(model: Any, bits: int | None) -> Any:
    """The model that drafts: a twin of narrow weights that shares everything else with the model, or the model itself.

    A twin is made at the first call, which takes a moment, and anew where weights have changed since.

    Args:
        bits: None for the model itself. It drafts too where it is quantised, or on another device than a processor.
    """
    modules = list(model.modules())
    on_processor = all(parameter.device.type == "cpu" for parameter in model.parameters())
    if bits is None or not on_processor or any(isinstance(module, QuantizedLinear) for module in modules):
        return model
    weights = [linear.weight for _, linear in _linears(model.transformer)] + [model.lm_head.weight]
    state = [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights]
    state.append((torch.get_num_threads(), int(model.transformer.few_token_kernels)))
    if model not in _TWINS or _TWINS[model][0] != state:
        _TWINS[model] = state, _twin(model)
    return _TWINS[model][1]


def _twin(model: Any) -> nn.Module:
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    shared |= {id(part): part for part in (model.config, model.generation_config)}
    twin = copy.deepcopy(model, shared)
    twin.transformer.core_is_compiled = False  # a compiler can't see into the kernels
    by_kernels = model.transformer.few_token_kernels
    for name, linear in list(_linears(twin.transformer)):
        narrow = in_8_bits(linear) if by_kernels else NarrowLinear(linear, name.startswith(DYNAMIC_PARTS))
        twin.transformer.set_submodule(name, narrow)
    twin.lm_head = NarrowHead(twin.lm_head, by_kernels)
    return twin


def in_8_bits(linear: nn.Linear) -> QuantizedLinear:
    """A layer's weights in 8 bits for the kernels of `few_tokens`; more tokens than those take get widened weights."""
    return QuantizedLinear.of(linear, WEIGHT_ONLY, 8, DEFAULT_GROUP_SIZE)
