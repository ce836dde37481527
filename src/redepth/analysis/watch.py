"""Where a watched pass is: what recording and patching are built on.

A watcher is attached to `model.transformer.watchers`. The stack tells it of every pass before any compute
(`start_pass`), and calls
it with each part of the pass at its (layer, step); what it gives back takes the part's place.
"""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from redepth.errors import RedepthError
from redepth.modeling import RecurrentDepthForCausalLM
from redepth.modeling.passes import PassContext

# What can be watched, each [B, T, D] but for the last two.
STATE, EMBEDDED, LAYER, ATTENTION, MLP, LOGITS, ATTENTION_MAP = PARTS = (
    "state",
    "embedded",
    "layer",
    "attention",
    "mlp",
    "logits",
    "attention-map",
)
BY_LAYER = (LAYER, ATTENTION, MLP, ATTENTION_MAP)
CAN_BE_PATCHED = (STATE, EMBEDDED, LAYER, ATTENTION, MLP)
# Attention implementations whose probabilities can be worked out beside them.
WITH_A_MAP = ("eager", "sdpa")


def check_part(part: str, known: Sequence[str]) -> str:
    """Raises RedepthError for a part that is not one of `known`."""
    if part not in known:
        near = difflib.get_close_matches(str(part), known, n=1)
        raise RedepthError(
            f"part {part!r} is not one of {', '.join(known)}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    return part


def check_numbers(name: str, numbers: Sequence[int] | int | None, end: int | None = None) -> frozenset[int] | None:
    """The numbers as a set, or None for all.

    Raises:
        RedepthError: for an empty list, for anything but whole numbers, and for numbers outside 0 … end − 1.
    """
    if numbers is None:
        return None
    chosen = [numbers] if isinstance(numbers, int) else list(numbers)
    if not chosen:
        raise RedepthError(f"{name} names nothing; leave it out for all")
    for number in chosen:
        if not isinstance(number, int) or isinstance(number, bool) or number < 0 or (end is not None and number >= end):
            upper = f"0 to {end - 1}" if end is not None else "0 or more"
            raise RedepthError(f"{name} has {number!r}; it takes whole numbers, {upper}")
    return frozenset(chosen)


class Watcher:
    """Follows the passes of a model, and knows which token of which row is where in each.

    Tokens are counted in their row without padding, over all passes of a text: a prompt and each token generated after it.
    """

    def __init__(self, model: Any) -> None:
        if not isinstance(model, RecurrentDepthForCausalLM):
            raise RedepthError(f"a {type(model).__name__} has no steps to follow; give a model that redepth.load gives")
        self.model: RecurrentDepthForCausalLM = model
        self.num_steps = 0
        self.first_row = 0  # of the present batch, among all rows that were seen
        self.batch = 0
        # Of the present batch, [B, columns so far]: which columns are tokens.
        self.columns = torch.zeros(0, 0, dtype=torch.bool)
        # Of the present pass, [B, T].
        self.real = torch.zeros(0, 0, dtype=torch.bool)
        self.index = torch.zeros(0, 0, dtype=torch.long)

    def start_pass(
        self, hidden: torch.Tensor, context: PassContext, num_steps: int, attention_mask: torch.Tensor | None
    ) -> None:
        """Told of a pass over `hidden` `[B, T, D]` before it runs.

        Raises:
            RedepthError: in training mode, whose backward pass runs layers again, and for a pass that does not go on
                where the last one ended.
        """
        if self.model.training:
            raise RedepthError("record and patch are for inference; call model.eval() first")
        batch, tokens = hidden.shape[:2]
        past = context.cache.get_seq_length() if context.cache is not None else 0
        if past == 0:
            self.first_row += self.batch
            self.batch, self.columns = batch, torch.zeros(batch, 0, dtype=torch.bool)
        elif self.batch == 0:
            # What ran before is not known; its padding is the cache's to say.
            mask = context.cache.padding_mask if context.cache is not None else None
            known = torch.ones(batch, past, dtype=torch.bool) if mask is None else mask[:, :past].bool().cpu()
            self.batch, self.columns = batch, known
        if (batch, past) != self.columns.shape:
            raise RedepthError(
                f"a pass goes on from {past} tokens in {batch} rows, but {self.columns.shape[1]} in {self.columns.shape[0]} "
                "were followed; record and patch plain decoding, without beams or a cropped cache"
            )
        if attention_mask is not None and attention_mask.ndim == 2:
            real = attention_mask[:, past:].bool().cpu()
        else:
            real = torch.ones(batch, tokens, dtype=torch.bool)
        self.num_steps = num_steps
        self.real = real
        self.index = self.columns.sum(1, keepdim=True) + real.long().cumsum(1) - 1
        self.columns = torch.cat([self.columns, real], dim=1)

    def wants(self, part: str, layer: int | None, step: int) -> bool:
        """Whether a part that costs something to work out is asked for."""
        return False

    def __call__(
        self, part: str, layer: int | None, step: int, value: torch.Tensor, context: PassContext
    ) -> torch.Tensor:
        raise NotImplementedError

    def cells(self, context: PassContext) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows of the batch, tokens of their rows, and which cells are tokens at all, each `[rows, places]`."""
        subset = context.subset
        if subset is None:
            rows = torch.arange(len(self.real))[:, None].expand_as(self.real)
            return rows, self.index, self.real
        rows = subset.rows.cpu()[:, None].expand_as(subset.positions)
        places = subset.positions.cpu()
        return rows, self.index[rows, places], subset.real.cpu() & self.real[rows, places]


@contextmanager
def watching(model: RecurrentDepthForCausalLM, watcher: Watcher) -> Iterator[None]:
    """Attach a watcher to the model for the block."""
    stack = model.transformer
    stack.watchers += (watcher,)
    try:
        yield
    finally:
        stack.watchers = tuple(other for other in stack.watchers if other is not watcher)
