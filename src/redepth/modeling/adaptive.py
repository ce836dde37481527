"""Adaptive exit: the loop over the core in which each token leaves when its own test says so.

Shapes: B batch, T new tokens, D width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .errors import UserError
from .passes import PassContext
from .policy import DepthPolicy
from .tokens import TokenSubset

# What the coda left, […, D], to logits […, V].
Head = Callable[[torch.Tensor], torch.Tensor]


def run_adaptive(
    stack: Any,
    embedded: torch.Tensor,
    state: torch.Tensor,
    context: PassContext,
    policy: DepthPolicy,
    real: torch.Tensor | None,
    head: Head | None,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Adaptive exit: every token leaves the loop when its test says so, and costs the core nothing from then on.

    What stands in for the deeper steps of an exited token is up to the cache rule.

    Args:
        stack: the `RecurrentStack`.
        real: `[B, T]`, which tokens are not padding; padding leaves after the first step.
        head: makes what a test of logits looks at; needed by such a test alone.

    Returns:
        the states `[B, T, D]`, the steps each token ran `[B, T]`, and the core's passes in tokens.

    Raises:
        ValueError: for a test of logits without a head to make them.
    """
    tracker = policy.tracker()
    assert tracker is not None
    if tracker.test.of_logits and head is None:
        raise UserError(f"criterion {tracker.test.name!r} reads logits, which need a head; use latent-diff or cosine")
    active = torch.ones(embedded.shape[:2], dtype=torch.bool, device=embedded.device)
    steps_run = torch.zeros_like(active, dtype=torch.long)
    core_passes = 0
    for step in range(1, policy.num_steps + 1):
        subset = TokenSubset.of(active)
        core_passes += subset.positions.numel()
        steps_run = steps_run + active
        whole = bool(active.all())
        running = replace(context if whole else context.gather(subset), steps_run=steps_run)
        if whole:
            moved = state = stack.step(embedded, state, running, step).to(embedded.device)
        else:
            moved = stack.step(subset.gather(embedded), subset.gather(state), running, step).to(embedded.device)
            state = state.clone()
            state[active] = moved[subset.real]
        if step == policy.num_steps:
            break
        if tracker.looks_at(step):
            looked_at, of_token = moved, active.flatten().nonzero()[:, 0]
            if tracker.test.of_logits:
                looked_at = stack.run_coda(moved, running)[1].to(embedded.device)
            made_by = head if tracker.test.of_logits else None
            active = active.masked_scatter(active, ~tracker.settled(looked_at[subset.real], of_token, step, made_by))
        if real is not None:
            active = active & real
        if not bool(active.any()):
            break
    return state, steps_run, core_passes
