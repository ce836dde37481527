"""Cross-entropy without the whole table of logits."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**25  # 128 MiB in fp32

# (logits [n, V] in fp32, targets [n], places of these tokens among the batch's B * (T - 1), [n]) to a summed loss
TokenLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def cross_entropy_of_tokens(logits: torch.Tensor, targets: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The plain next-token loss, summed."""
    return F.cross_entropy(logits, targets, reduction="sum")


class _SummedInChunks(torch.autograd.Function):
    """A sum over tokens whose gradients are computed in the forward pass, while each chunk's logits are available.

    The backward pass then recomputes nothing: it scales what the forward pass has kept, which is no larger than
    the inputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        summed: Callable[[torch.Tensor, int], torch.Tensor],
        size: int,
        states: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        total = states.new_zeros((), dtype=torch.float32)
        learns = ctx.needs_input_grad[2]
        states_grad = torch.zeros_like(states) if learns else None
        grads = [torch.zeros_like(parameter) for parameter in parameters]
        for first in range(0, len(states), size):
            chunk = states[first : first + size].detach().requires_grad_(learns)
            wanted = [chunk, *parameters] if learns else [*parameters]
            with torch.enable_grad():
                loss = summed(chunk, first)
            gradients = list(torch.autograd.grad(loss, wanted, materialize_grads=True))
            if states_grad is not None:
                states_grad[first : first + size] = gradients.pop(0)
            for grad, part in zip(grads, gradients, strict=True):
                grad += part
            total += loss.detach()
        ctx.save_for_backward(states_grad, *grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *(None if kept is None else kept * grad.to(kept.dtype) for kept in ctx.saved_tensors)


def chunked_cross_entropy(
    hidden: torch.Tensor,
    labels: torch.Tensor | None,
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    vocab_size: int,
    num_items: torch.Tensor | int | None = None,
    token_loss: TokenLoss = cross_entropy_of_tokens,
    parameters: Iterable[torch.Tensor] = (),
    shift_labels: torch.Tensor | None = None,
    sharded: bool = False,
) -> torch.Tensor:
    """Next-token loss, with logits computed a few tokens at a time.

    The logits of a row of text are by far the largest tensor of training (512 tokens of a 262k vocabulary are half a
    gigabyte). Gradients, where needed, are computed chunk by chunk as well, so that no logits are computed twice.

    Args:
        hidden: `[B, T, D]`, as the head takes it.
        labels: `[B, T]`, shifted here; -100 is left out, and no logits are made there.
        logits_of: gives the logits `[n, V]` of `[n, D]`.
        num_items: what the summed loss is divided by; the number of labels by default.
        token_loss: the loss of some tokens, where it is not the plain cross-entropy.
        parameters: what `logits_of` reads besides its argument; those without requires_grad are skipped.
        shift_labels: `[B, T]`, each token's target itself, in place of `labels`.
        sharded: FSDP holds what `logits_of` reads. It takes any backward pass for the whole model's and gives the weights
            back after it, so that none may run here: the logits are computed again when the model's own comes.

    Returns:
        the loss in nats, a scalar in fp32.
    """
    if shift_labels is None:
        assert labels is not None
        states, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(hidden.device)
    else:
        states, targets = hidden.flatten(0, 1), shift_labels.flatten().to(hidden.device)
    places = (targets != -100).nonzero()[:, 0]
    if len(places) < len(targets):
        states, targets = states[places], targets[places]
    size = max(LOGITS_AT_ONCE // vocab_size, 1)

    def summed(chunk: torch.Tensor, first: int) -> torch.Tensor:
        return token_loss(logits_of(chunk).float(), targets[first : first + size], places[first : first + size])

    learned = [parameter for parameter in parameters if parameter.requires_grad]
    if torch.is_grad_enabled() and (states.requires_grad or learned) and not sharded:
        total = _SummedInChunks.apply(summed, size, states, *learned)
    else:
        total = hidden.new_zeros((), dtype=torch.float32)
        for first in range(0, len(states), size):
            chunk = states[first : first + size]
            total = total + (checkpoint(summed, chunk, first, use_reentrant=False) if sharded else summed(chunk, first))
    return total / (num_items if num_items is not None else len(targets))
