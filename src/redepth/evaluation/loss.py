"""Held-out loss by number of steps."""

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from redepth.modeling import RecurrentDepthForCausalLM

DEPTHS = (1, 2, 4, 8, 16)


def loss_by_depth(
    model: RecurrentDepthForCausalLM,
    tokens: torch.Tensor,
    depths: Sequence[int] = DEPTHS,
    batch_size: int = 4,
    on_row: Callable[[int, int], None] | None = None,
    labels: torch.Tensor | None = None,
) -> dict[int, float]:
    """Mean next-token cross-entropy, in nats, after each of `depths` steps; arguments are those of `token_losses`.

    Returns:
        loss by depth, in the order given.
    """
    losses = token_losses(model, tokens, depths, batch_size, on_row, labels)
    predicted = int(((tokens if labels is None else labels)[:, 1:] != -100).sum())
    return {depth: loss.double().sum().item() / predicted for depth, loss in losses.items()}


@torch.no_grad()
def token_losses(
    model: RecurrentDepthForCausalLM,
    tokens: torch.Tensor,
    depths: Sequence[int] = DEPTHS,
    batch_size: int = 4,
    on_row: Callable[[int, int], None] | None = None,
    labels: torch.Tensor | None = None,
) -> dict[int, torch.Tensor]:
    """Next-token cross-entropy of every token, in nats, after each of `depths` steps.

    One pass serves every depth: the core is iterated to the deepest, and coda and head read the states along the
    way. Noise states are the seeded ones, so the same call gives the same figures.

    Args:
        tokens: `[rows, tokens]`, without padding.
        labels: `[rows, tokens]`, -100 for what does not count; the tokens themselves by default.
        on_row: called with (rows done, rows in all).

    Returns:
        by depth, in the order given, `[rows, tokens - 1]` in fp32 on the processor, 0 for what does not count.
    """
    was_training = model.training
    model.eval()
    labels = tokens if labels is None else labels
    found: dict[int, list[torch.Tensor]] = {depth: [] for depth in depths}
    for start in range(0, len(tokens), batch_size):
        ids = tokens[start : start + batch_size].to(model.device)
        targets = labels[start : start + batch_size, 1:].to(model.device)
        for step, state in enumerate(model.states_by_step(ids, max(depths))):
            if step in found:
                logits = model.predict_from_latents(state).logits
                assert logits is not None
                for row, wanted in zip(logits, targets, strict=True):  # so that one row alone is widened to fp32
                    found[step].append(F.cross_entropy(row[:-1].float(), wanted, reduction="none").cpu())
        if on_row is not None:
            on_row(min(start + batch_size, len(tokens)), len(tokens))
    model.train(was_training)
    return {depth: torch.stack(rows) for depth, rows in found.items()}
