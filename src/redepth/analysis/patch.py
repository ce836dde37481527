"""Putting a recorded state, layer output or any other tensor into another run, so that causal questions can be asked."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from redepth.errors import RedepthError
from redepth.modeling.passes import PassContext

from .watch import BY_LAYER, CAN_BE_PATCHED, STATE, Watcher, check_numbers, check_part, watching


class Patch(Watcher):
    """Replaces some tokens' values of one part at some steps; see `patch`."""

    def __init__(
        self,
        model: Any,
        part: str,
        value: torch.Tensor | float,
        step: Sequence[int] | int | None = None,
        layer: int | None = None,
        tokens: Sequence[int] | None = None,
        rows: Sequence[int] | int | None = None,
    ) -> None:
        super().__init__(model)
        self.part = check_part(part, CAN_BE_PATCHED)
        if (part in BY_LAYER) != (layer is not None):
            raise RedepthError(f"part {part!r} needs {'a' if layer is None else 'no'} layer, got layer={layer}")
        if layer is not None:
            check_numbers("layer", layer, model.config.n_layers)
        self.layer = layer
        self.steps = check_numbers("step", step)
        if part == STATE and self.steps is None:
            raise RedepthError("part 'state' needs a step to patch; 0 is the initial state")
        self.chosen_rows = check_numbers("rows", rows)
        self.value = value if isinstance(value, torch.Tensor) else torch.tensor(float(value))
        self.tokens: list[int] | None = None
        if tokens is not None:
            self.tokens = list(tokens)
            if self.tokens:
                check_numbers("tokens", self.tokens)
            if len(set(self.tokens)) != len(self.tokens):
                raise RedepthError(f"tokens names {max(self.tokens, key=self.tokens.count)} twice")
        self._check_shape()
        self._reached: set[int] = set()  # tokens that the patch came to

    def _check_shape(self) -> None:
        shape, width = list(self.value.shape), self.model.config.n_embd
        if self.value.ndim == 0:
            return
        if self.value.ndim > 2 or shape[-1] != width:
            raise RedepthError(f"the value has shape {shape}, but [tokens, {width}], [{width}] or a number is needed")
        if self.value.ndim == 2 and self.tokens is not None and shape[0] != len(self.tokens):
            raise RedepthError(f"the value is of {shape[0]} tokens, but {len(self.tokens)} tokens are named")

    def start_pass(
        self, hidden: torch.Tensor, context: PassContext, num_steps: int, attention_mask: torch.Tensor | None
    ) -> None:
        """See `Watcher.start_pass`; raises RedepthError for a patch that this pass has no place for."""
        beyond = [step for step in self.steps or () if step > num_steps]
        if beyond:
            raise RedepthError(f"step {max(beyond)} was to be patched, but num_steps is {num_steps}; run deeper")
        first = self.batch == 0
        super().start_pass(hidden, context, num_steps, attention_mask)
        if self.chosen_rows is not None and max(self.chosen_rows) >= self.batch:
            raise RedepthError(f"row {max(self.chosen_rows)} was to be patched, but the batch has {self.batch}, from 0")
        if self.tokens is None and self.value.ndim == 2 and first:
            lengths = self.columns.sum(1)
            chosen = lengths if self.chosen_rows is None else lengths[sorted(self.chosen_rows)]
            if bool((chosen != len(self.value)).any()):
                raise RedepthError(
                    f"the value is of {len(self.value)} tokens, but the rows have {sorted(set(chosen.tolist()))}; name tokens"
                )
            self.tokens = list(range(len(self.value)))

    def __call__(
        self, part: str, layer: int | None, step: int, value: torch.Tensor, context: PassContext
    ) -> torch.Tensor:
        if part != self.part or layer != self.layer or (self.steps is not None and step not in self.steps):
            return value
        rows, tokens, real = self.cells(context)
        if self.chosen_rows is not None:
            real = real & torch.isin(rows, torch.tensor(sorted(self.chosen_rows)))
        if self.tokens is not None:
            real = real & torch.isin(tokens, torch.tensor(self.tokens, dtype=torch.long))
        if not bool(real.any()):
            return value
        self._reached |= set(tokens[real].tolist())
        put = self.value.to(value)
        if put.ndim == 2:
            assert self.tokens is not None
            place = {token: at for at, token in enumerate(self.tokens)}
            put = put[[place[token] for token in tokens[real].tolist()]]
        patched = value.clone()
        patched[real.to(value.device)] = put
        return patched

    def check_reached(self) -> None:
        """Raises RedepthError for tokens that no pass came to."""
        left = sorted(set(self.tokens or ()) - self._reached) if self.tokens is not None else []
        if left or (self.tokens is None and not self._reached):
            what = f"token {left[0]}" if left else "any token"
            raise RedepthError(
                f"the patch of {self.part!r} was never applied to {what}; no pass in the block ran it at the named step"
            )


@contextmanager
def patch(
    model: Any,
    part: str,
    value: torch.Tensor | float,
    step: Sequence[int] | int | None = None,
    layer: int | None = None,
    tokens: Sequence[int] | None = None,
    rows: Sequence[int] | int | None = None,
) -> Iterator[None]:
    """Put a value in the place of what the model computes, in every pass inside the block; blocks can be nested.

    What comes after reads the new value; keys and values that a token stored before the place stay as they were.

    Args:
        part: `state`, `embedded`, `layer`, `attention` or `mlp`, as `record` names them.
        value: `[tokens, width]` as `Record.get` gives it, `[width]` for all tokens alike, or a number.
        step: where, 0 for the initial state; all steps by default, but for a state.
        layer: for `layer`, `attention` and `mlp`, counted over the whole stack from 0.
        tokens: which tokens of a row, counted without padding; all by default, and none for an empty list.
        rows: which rows of the batch; all by default.

    Raises:
        RedepthError: for a value of the wrong shape or a place that there is not, before any compute; at the end of the
            block for tokens that no pass came to.

    Example (a later step into an earlier one):
        with redepth.record(model) as rec:
            model(input_ids, num_steps=8)
        with redepth.patch(model, "state", rec.get("state", step=8), step=2):
            early = model(input_ids, num_steps=2).logits
    """
    made = Patch(model, part, value, step, layer, tokens, rows)
    with watching(made.model, made):
        yield
    made.check_reached()
