"""A finished checkpoint beside its source, on the same held-out rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from redepth.checkpoint.load import load
from redepth.checkpoint.sources import recorded_source

from .loss import loss_by_depth


@dataclass(frozen=True)
class Evaluation:
    """
    Attributes:
        data: what the rows are of.
        loss: nats per token, by number of steps.
        source_loss: of the model that was converted, on the same rows; None where there is none.
    """

    data: str
    rows: int
    tokens: int
    loss: dict[int, float]
    source_loss: float | None


@torch.no_grad()
def next_token_loss(model: Any, tokens: torch.Tensor) -> float:
    """Mean next-token cross-entropy of a transformers model on rows `[rows, tokens]`, in nats, one row at a time."""
    total = 0.0
    for row in tokens:
        logits = model(row[None].to(model.device), use_cache=False).logits[0, :-1].float()
        total += F.cross_entropy(logits, row[1:].to(model.device), reduction="sum").item()
    return total / (tokens.shape[0] * (tokens.shape[1] - 1))


def evaluate_held_out(
    folder: Path,
    tokens: torch.Tensor,
    data: str,
    depths: Sequence[int],
    on_row: Callable[[int, int], None] | None = None,
    device: str | torch.device = "auto",
) -> Evaluation:
    """Losses of a checkpoint at each of `depths` and of its source, both in the precision they are saved in.

    Args:
        tokens: `[rows, tokens]`, without padding.
        on_row: called with (rows done, rows in all) for the checkpoint.
    """
    model: Any = load(folder, device=device)
    loss = loss_by_depth(model, tokens, depths, on_row=on_row)
    dtype, model_device = model.dtype, model.device
    del model
    source = recorded_source(folder)
    source_loss = None
    if source is not None:
        source_loss = next_token_loss(source.reference_model().to(model_device, dtype), tokens)
    return Evaluation(data, tokens.shape[0], tokens.numel(), loss, source_loss)
