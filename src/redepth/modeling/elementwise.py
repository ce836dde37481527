"""Chains of small operations, which are bound by memory on a processor, and the norm that every model here uses."""

import torch
from torch import nn
from torch.compiler import is_compiling
from torch.nn import functional as F

# tokens at a time, where no gradient is wanted: what they need of a thousand channels stays in a second-level cache
BLOCK = 256


def times(fresh: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """fresh · other, written over `fresh` unless a gradient needs it: new memory costs more than the product."""
    return fresh * other if fresh.requires_grad or other.requires_grad else fresh.mul_(other)


def fits_no_cache(x: torch.Tensor) -> bool:
    """Whether it is better to process `x` `[B, T, …]` in blocks of `BLOCK` tokens.

    On the CPU long chains of small operations are bound by memory, and by fresh memory most of all. A gradient needs
    that memory anyway, and a compiler has its own ways.
    """
    return x.shape[1] > BLOCK and x.device.type == "cpu" and not torch.is_grad_enabled() and not is_compiling()


class RMSNorm(nn.Module):
    """Root-mean-square norm, normalised in fp32 (Zhang and Sennrich 2019).

    Args:
        width: of the last dimension.
        one_plus: multiply by (1 + w) before the cast to the working dtype, as Gemma does, and not by w after it.
    """

    def __init__(self, width: int, eps: float, one_plus: bool) -> None:
        super().__init__()
        self.eps = eps
        self.one_plus = one_plus
        self.weight = nn.Parameter(torch.zeros(width) if one_plus else torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` is `[B, T, …, width]`."""
        if fits_no_cache(x):
            out = torch.empty_like(x)
            for part, place in zip(x.split(BLOCK, 1), out.split(BLOCK, 1), strict=True):
                place.copy_(self(part))
            return out
        if x.dtype == torch.float32 == self.weight.dtype and not self.one_plus:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        # torch's own norm rounds as transformers' written-out one does in fp32, and is quicker
        normed = F.rms_norm(x.float(), self.weight.shape, None, self.eps)
        if self.one_plus:
            return times(normed, 1.0 + self.weight.float()).to(x.dtype)
        return normed.to(x.dtype) * self.weight
