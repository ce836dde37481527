"""How much one step can stretch a small change of the state: the largest singular value of its Jacobian."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from redepth.errors import RedepthError

ITERATIONS = 50
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Stretch:
    """
    Attributes:
        largest: the largest singular value; a step with one below 1 contracts, from wherever it starts.
        iterations: rounds of power iteration that were run.
        converged: whether the last round changed the value by less than the tolerance; it is a lower bound otherwise.
    """

    largest: float
    iterations: int
    converged: bool


def largest_stretch(
    step: Callable[[torch.Tensor], torch.Tensor],
    state: torch.Tensor,
    iterations: int = ITERATIONS,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> Stretch:
    """Power iteration on JᵀJ, J the Jacobian of `step` at `state`, which is never written out.

    Each round is a product with J (`jvp`) and one with Jᵀ (`vjp`), about four times the cost of the step.

    Args:
        step: s ↦ core(adapter([s; e])), of any shape that `state` has.
        state: floating point; fp32 is enough for the tolerance.
        iterations: most rounds.
        tolerance: relative change of the value at which to stop.
        seed: of the first direction.

    Raises:
        RedepthError: for fewer than one iteration.
    """
    if iterations < 1:
        raise RedepthError(f"iterations must be at least 1, got {iterations}")
    state = state.detach()
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(state.shape, generator=generator, dtype=torch.float32).to(state.device, state.dtype)
    direction = direction / direction.norm()
    pulled: Any = torch.func.vjp(step, state)
    pull_back = pulled[1]
    largest, done = 0.0, 0
    for done in range(1, iterations + 1):
        both: Any = torch.func.jvp(step, (state,), (direction,))
        pushed = both[1]
        before, largest = largest, float(pushed.detach().norm())
        if abs(largest - before) <= tolerance * largest:
            return Stretch(largest, done, True)
        (direction,) = pull_back(pushed)
        direction = direction / direction.norm()
    return Stretch(largest, done, False)
