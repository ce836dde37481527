"""Cross-entropy without the whole table of logits."""

from collections.abc import Callable

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**24  # 64 MiB in fp32

# (logits [n, V] in fp32, targets [n], index of the first of these tokens among the batch's B * (T - 1)) to a summed loss
TokenLoss = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def cross_entropy_of_tokens(logits: torch.Tensor, targets: torch.Tensor, first: int) -> torch.Tensor:
    """The plain next-token loss, summed over the tokens whose target is not -100."""
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


def chunked_cross_entropy(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    vocab_size: int,
    num_items: torch.Tensor | int | None = None,
    token_loss: TokenLoss = cross_entropy_of_tokens,
) -> torch.Tensor:
    """Next-token loss, its logits made a few tokens at a time and made again in the backward pass.

    The logits of a row of text are by far the largest tensor of training (512 tokens of a 262k vocabulary are half a
    gigabyte); one more head product is cheaper than holding and reading them.

    Args:
        hidden: `[B, T, D]`, as the head takes it.
        labels: `[B, T]`, shifted here; -100 is left out.
        num_items: what the summed loss is divided by; the number of labels by default.
        token_loss: the loss of some tokens, where it is not the plain cross-entropy.

    Returns:
        the loss in nats, a scalar in fp32.
    """

    def summed(states: torch.Tensor, targets: torch.Tensor, first: int) -> torch.Tensor:
        return token_loss(logits_of(states).float(), targets, first)

    states, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(hidden.device)
    size = max(LOGITS_AT_ONCE // vocab_size, 1)
    total = hidden.new_zeros((), dtype=torch.float32)
    for first in range(0, len(targets), size):
        some = slice(first, first + size)
        total = total + checkpoint(summed, states[some], targets[some], first, use_reentrant=False)
    return total / (num_items if num_items is not None else (targets != -100).sum())
