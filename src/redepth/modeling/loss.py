"""Cross-entropy without the whole table of logits."""

from collections.abc import Callable

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**24  # 64 MiB in fp32


def chunked_cross_entropy(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    vocab_size: int,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Next-token loss, its logits made a few tokens at a time and made again in the backward pass.

    The logits of a row of text are by far the largest tensor of training (512 tokens of a 262k vocabulary are half a
    gigabyte); one more head product is cheaper than holding and reading them.

    Args:
        hidden: `[B, T, D]`, as the head takes it.
        labels: `[B, T]`, shifted here; -100 is left out.
        num_items: what the summed loss is divided by; the number of labels by default.

    Returns:
        the loss in nats, a scalar in fp32.
    """

    def summed(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits_of(states).float(), targets, ignore_index=-100, reduction="sum")

    states, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(hidden.device)
    size = max(LOGITS_AT_ONCE // vocab_size, 1)
    total = hidden.new_zeros((), dtype=torch.float32)
    for some_states, some_targets in zip(states.split(size), targets.split(size), strict=True):
        total = total + checkpoint(summed, some_states, some_targets, use_reentrant=False)
    return total / (num_items if num_items is not None else (targets != -100).sum())
