"""How many steps a forward pass runs: reading `num_steps`, and drawing it for training."""

import math
from typing import Any

import torch

from .errors import UserError


def split_num_steps(num_steps: Any) -> tuple[int, int]:
    """(steps without gradient, steps with gradient) from an int, a pair, or a tensor of one or two entries.

    A scalar puts every step under the gradient, so that training with a plain number gives gradients.

    Raises:
        ValueError: for anything else, for negative counts, and for fewer than one step in all.
    """
    given = num_steps.tolist() if isinstance(num_steps, torch.Tensor) else num_steps
    if isinstance(given, (list, tuple)):
        counts = tuple(given) if len(given) != 1 else (0, given[0])
    else:
        counts = (0, given)
    if len(counts) != 2 or not all(isinstance(count, int) and not isinstance(count, bool) for count in counts):
        raise UserError(f"num_steps takes an integer or a pair (without gradient, with gradient), got {num_steps!r}")
    if min(counts) < 0 or sum(counts) < 1:
        raise UserError(f"num_steps must be at least 1, got {num_steps!r}")
    return counts[0], counts[1]


def sample_num_steps(mean: float, backprop_depth: int, generator: torch.Generator | None = None) -> tuple[int, int]:
    """Draw the depth of one training step (Geiping et al. 2025, section 3.3).

    p ~ Poisson(LogNormal(log m − σ²/2, σ = 0.5)) + 1 for mean m, as published; p itself has mean m + 1.

    Args:
        mean: m, above 0.
        backprop_depth: how many of the last steps carry a gradient.
        generator: torch's default one if left out.

    Returns:
        (steps without gradient, steps with gradient).
    """
    sigma = 0.5
    rate = torch.exp(math.log(mean) - sigma**2 / 2 + sigma * torch.randn((), generator=generator))
    steps = int(torch.poisson(rate, generator=generator)) + 1
    return max(steps - backprop_depth, 0), min(backprop_depth, steps)
