"""Held-out loss by number of steps."""

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from redepth.modeling import RecurrentDepthForCausalLM

DEPTHS = (1, 2, 4, 8, 16)


@torch.no_grad()
def loss_by_depth(
    model: RecurrentDepthForCausalLM,
    tokens: torch.Tensor,
    depths: Sequence[int] = DEPTHS,
    batch_size: int = 4,
    on_row: Callable[[int, int], None] | None = None,
    labels: torch.Tensor | None = None,
) -> dict[int, float]:
    """Mean next-token cross-entropy, in nats, after each of `depths` steps.

    One pass serves every depth: the core is iterated to the deepest, and coda and head read the states along the
    way. Noise states are the seeded ones, so the same call gives the same figures.

    Args:
        tokens: `[rows, tokens]`, without padding.
        labels: `[rows, tokens]`, -100 for what does not count; the tokens themselves by default.
        on_row: called with (rows done, rows in all).

    Returns:
        loss by depth, in the order given.
    """
    was_training = model.training
    model.eval()
    labels = tokens if labels is None else labels
    totals = dict.fromkeys(depths, 0.0)
    for start in range(0, len(tokens), batch_size):
        ids = tokens[start : start + batch_size].to(model.device)
        targets = labels[start : start + batch_size, 1:].to(model.device)
        for step, state in enumerate(model.states_by_step(ids, max(depths))):
            if step in totals:
                logits = model.predict_from_latents(state).logits
                assert logits is not None
                for row, wanted in zip(logits, targets, strict=True):  # so that one row alone is widened to fp32
                    totals[step] += F.cross_entropy(row[:-1].float(), wanted, reduction="sum").item()
        if on_row is not None:
            on_row(min(start + batch_size, len(tokens)), len(tokens))
    model.train(was_training)
    predicted = int((labels[:, 1:] != -100).sum())
    return {depth: total / predicted for depth, total in totals.items()}
