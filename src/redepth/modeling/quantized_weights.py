"""Weights in 16, 8 or 4 bits and back, written plainly: what every kernel has to agree with.

Shapes: N outputs, K inputs, G groups of inputs that share a scale.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

LARGEST_INT8 = 127
INT4_LEVELS = 15
# Ranges tried for each group of 4-bit weights, as shares of the span of its values: a narrower one cuts the outliers.
SPANS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


@dataclass
class QuantizedWeights:
    """A matrix `[N, K]` as it is stored.

    Attributes:
        weight: fp16 or int8 `[N, K]`; in 4 bits uint8 `[N, K'/2]`, input 2i in the low half of byte i and 2i + 1 in the
            high one, where K' is K filled up to whole groups.
        scale: in 8 bits fp32 `[N]`; in 4 bits bf16 `[N, G]`.
        offset: in 4 bits bf16 `[N, G]`, the value that level 8 stands for.
    """

    weight: torch.Tensor
    scale: torch.Tensor | None = None
    offset: torch.Tensor | None = None


def stored_shapes(
    bits: int, outputs: int, inputs: int, group_size: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor of a `QuantizedWeights`."""
    if bits == 16:
        return {"weight": ((outputs, inputs), torch.float16)}
    if bits == 8:
        return {"weight": ((outputs, inputs), torch.int8), "scale": ((outputs,), torch.float32)}
    groups = math.ceil(inputs / group_size)
    return {
        "weight": ((outputs, groups * group_size // 2), torch.uint8),
        "scale": ((outputs, groups), torch.bfloat16),
        "offset": ((outputs, groups), torch.bfloat16),
    }


def quantize(weight: torch.Tensor, bits: int, group_size: int) -> QuantizedWeights:
    """Round `[N, K]` to fp16, to 8 bits with a scale for each output, or to 4 with scale and offset for each group of inputs."""
    if bits == 16:
        return QuantizedWeights(weight.half())
    return to_int8(weight) if bits == 8 else to_int4(weight, group_size)


def to_int8(weight: torch.Tensor) -> QuantizedWeights:
    """Symmetric: the largest weight of an output becomes ±127."""
    weight = weight.float()
    largest = weight.abs().amax(-1)
    scale = torch.where(largest > 0, largest, 1.0) / LARGEST_INT8
    return QuantizedWeights((weight / scale[:, None]).round().to(torch.int8), scale)


def to_int4(weight: torch.Tensor, group_size: int) -> QuantizedWeights:
    """16 levels for each group, over the range of least squared error among SPANS of the group's values."""
    inputs = weight.shape[1]
    fillers = -inputs % group_size
    # Copies of the last value widen no group's span; they don't count where errors are weighed.
    filled = F.pad(weight.float()[None], (0, fillers), mode="replicate")[0]
    grouped = filled.unflatten(-1, (-1, group_size))
    counts = F.pad(torch.ones(inputs, device=weight.device), (0, fillers)).unflatten(-1, (-1, group_size))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    middle = (low + high) / 2
    # A group of one value has no span; its steps are as fine as bf16 tells numbers of that size apart.
    span = (high - low).maximum(middle.abs() / 128).clamp(min=torch.finfo(torch.bfloat16).tiny * INT4_LEVELS)
    best = torch.full_like(low, math.inf)
    scale, offset, levels = torch.zeros_like(low), torch.zeros_like(low), torch.zeros_like(grouped)
    for share in SPANS:
        # Rounded as they will be stored, so that the levels are chosen for the very numbers that are read later.
        tried_scale = (span * share / INT4_LEVELS).bfloat16().float()
        tried_offset = (middle + tried_scale / 2).bfloat16().float()
        tried = ((grouped - tried_offset) / tried_scale + 8).round().clamp(0, INT4_LEVELS)
        error = ((tried - 8) * tried_scale + tried_offset - grouped).square().mul(counts).sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scale, offset = torch.where(better, tried_scale, scale), torch.where(better, tried_offset, offset)
        levels = torch.where(better, tried, levels)
    low_half, high_half = levels.flatten(1).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return QuantizedWeights(low_half | high_half << 4, scale[..., 0].bfloat16(), offset[..., 0].bfloat16())


def int4_levels(stored: QuantizedWeights) -> torch.Tensor:
    """The levels 0 … 15 of 4-bit weights, uint8 `[N, K']`."""
    return torch.stack([stored.weight & 15, stored.weight >> 4], dim=-1).flatten(1)


def dequantize(stored: QuantizedWeights, inputs: int) -> torch.Tensor:
    """The weights that stored ones stand for, fp32 `[N, K]`.

    Args:
        inputs: K.
    """
    if stored.scale is None:
        return stored.weight.float()
    if stored.offset is None:
        return stored.weight.float() * stored.scale[:, None]
    grouped = int4_levels(stored).float().unflatten(-1, (stored.scale.shape[1], -1)) - 8
    return (grouped * stored.scale[..., None].float() + stored.offset[..., None].float()).flatten(1)[:, :inputs]


def round_activations(x: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's inputs `[…, K]` as whole numbers from −levels to levels, and what they have to be multiplied by `[…, 1]`."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / levels
    return (x / scale).round(), scale
