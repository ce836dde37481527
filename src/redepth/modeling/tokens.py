"""Which tokens of a pass: those that are still in the loop, and padding moved out of the way."""

from dataclasses import dataclass

import torch
from transformers.utils import is_tracing

from .errors import UserError


def surely(condition: torch.Tensor) -> bool:
    """Whether a condition `[]` on data holds, for shortcuts; under a compiler it can't be asked, and the general way is taken."""
    return not is_tracing(condition) and bool(condition)


def check_numbers(logits: torch.Tensor) -> None:
    """Raises ValueError where a logit is not a number."""
    if bool(logits.isnan().any()):
        raise UserError("the model's logits are NaN; its weights are damaged, or its dtype is too narrow: try float32")


@dataclass
class TokenSubset:
    """Some of a pass's tokens, gathered row by row.

    Attributes:
        rows: `[rows]`, the rows of the batch that have such tokens.
        positions: `[rows, places]`, their positions in the pass; short rows are padded with position 0.
        real: `[rows, places]`, which places are tokens and not fillers.
        batch, tokens: the size of the whole pass.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    real: torch.Tensor
    batch: int
    tokens: int

    @classmethod
    def of(cls, active: torch.Tensor) -> "TokenSubset":
        """From `[batch, tokens]`, which tokens are in the subset; at least one must be."""
        rows = active.any(1).nonzero()[:, 0]
        chosen = active[rows]
        counts = chosen.sum(1)
        places = int(counts.max())
        # Tokens first, in order; a stable sort keeps it.
        positions = chosen.logical_not().to(torch.uint8).sort(dim=1, stable=True).indices[:, :places]
        real = torch.arange(places, device=active.device) < counts[:, None]
        return cls(rows, positions.masked_fill(~real, 0), real, *active.shape)

    def gather(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[batch or 1, tokens, …]` → `[rows, places, …]`."""
        rows = self.rows[:, None] if tokens.shape[0] > 1 else torch.zeros_like(self.rows)[:, None]
        return tokens[rows, self.positions]


def align_right(rows: torch.Tensor, order: torch.Tensor | None, dim: int) -> torch.Tensor:
    """Reorder dimension `dim` of `rows`, row by row, as `order` `[B, length of dim]` says."""
    if order is None:
        return rows
    shape = [1] * rows.ndim
    shape[0], shape[dim] = order.shape
    return rows.gather(dim, order.view(shape).expand_as(rows))


def stands_left(order: torch.Tensor) -> bool:
    """Whether `padding_first`'s order moves nothing."""
    return surely((order == torch.arange(order.shape[1], device=order.device)).all())


def padding_first(real: torch.Tensor) -> torch.Tensor:
    """The order `[B, T]` that moves padding left of each row's tokens and keeps their order.

    Args:
        real: `[B, T]`, bool, which columns are tokens.
    """
    return torch.sort(real.to(torch.uint8), dim=1, stable=True).indices


def padding_back(real: torch.Tensor) -> torch.Tensor:
    """Where each of the caller's columns `[B, T]` went under `padding_first`.

    A padding column after tokens reads as the last of them.
    """
    tokens, counts = real.shape[1], real.cumsum(1)
    return (tokens - counts[:, -1:] + (counts - 1).clamp(min=0)).clamp(max=tokens - 1)


def check_ids(ids: torch.Tensor, vocab_size: int, said: str = "the prompt") -> None:
    """Refuse tokens that the model has no embedding for.

    Args:
        said: how the error names what was tokenised.

    Raises:
        UserError: naming the token.
    """
    if not ids.numel():
        return
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= vocab_size:
        raise UserError(
            f"{said} holds token {least if least < 0 else most}, but the model's vocabulary has {vocab_size}; use the "
            "model's own tokenizer"
        )
