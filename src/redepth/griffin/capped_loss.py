"""Soft-capped logits and their cross-entropy, each in one pass over the logits, the largest tensor of all."""

from typing import Any

import torch
from torch import nn


class SoftCap(torch.autograd.Function):
    """cap · tanh(x / cap), written over x: logits are the largest tensor of all, and are not copied."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, cap: float) -> torch.Tensor:
        ctx.mark_dirty(logits)
        ctx.cap = cap
        logits.div_(cap).tanh_().mul_(cap)
        ctx.save_for_backward(logits)
        return logits

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (capped,) = ctx.saved_tensors
        slope = (capped / ctx.cap).square_().neg_().add_(1)
        return slope.mul_(grad), None


class CappedLoss(torch.autograd.Function):
    """Soft-capped logits, written over x `[N, V]`, and the sum of their cross-entropies in nats.

    One number a row is kept for the backward pass, which goes through loss and cap at once, block by block of rows.
    """

    ROWS = 8  # in fp32, 8 rows of 32,000 logits fit the second-level cache

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, cap: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.mark_dirty(logits)
        ctx.set_materialize_grads(False)
        ctx.cap = cap
        counted = labels != ignore_index
        safe = labels.masked_fill(~counted, 0)
        normalisers = []
        for block in logits.split(CappedLoss.ROWS):
            # In fp32 up to one rounding; where that is the dtype already, this writes over the block itself.
            wide = block.float().div_(cap).tanh_().mul_(cap)
            block.copy_(wide)
            normalisers.append(block.float().logsumexp(-1))
        normaliser = torch.cat(normalisers)
        ctx.save_for_backward(logits, safe, counted, normaliser)
        chosen = logits.gather(1, safe[:, None])[:, 0].float()
        return logits, (normaliser - chosen).masked_fill(~counted, 0.0).sum()

    @staticmethod
    def backward(
        ctx: Any, grad_logits: torch.Tensor | None, grad_loss: torch.Tensor | None
    ) -> tuple[torch.Tensor, None, None, None]:
        capped, safe, counted, normaliser = ctx.saved_tensors
        out = torch.empty_like(capped)
        weight = None if grad_loss is None else grad_loss * counted
        for start in range(0, len(capped), CappedLoss.ROWS):
            rows = slice(start, start + CappedLoss.ROWS)
            logits = capped[rows].float()
            part = torch.zeros_like(logits) if grad_logits is None else grad_logits[rows].float()
            if weight is not None:
                chances = (logits - normaliser[rows, None]).exp_()
                chances.scatter_add_(1, safe[rows, None], chances.new_full((len(chances), 1), -1.0))
                part = chances.mul_(weight[rows, None]).add_(part)
            # The slope of the cap, 1 − (y / cap)².
            out[rows] = part.mul_(logits.div_(ctx.cap).square_().neg_().add_(1))
        return out, None, None, None


def capped_loss(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    cap: float,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Capped logits over `logits` `[B·T, V]`, and transformers' causal loss with its arguments.

    Labels are `[B, T]`. The loss is the mean over the counted tokens, or their sum over `num_items_in_batch`.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    flat = shift_labels.reshape(-1).to(logits.device)
    capped, total = CappedLoss.apply(logits, flat, ignore_index, cap)
    count = (flat != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return capped, total / torch.as_tensor(count, device=total.device)
