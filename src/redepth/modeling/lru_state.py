"""The memory of one RG-LRU block, whichever model it is in.

Stored tokens are aligned to the right: a row that remembers fewer tokens than another has its gap at the left, where nothing
reads. Shapes: B batch, T new tokens, R width of the recurrence, C taps of the convolution.
"""

from collections.abc import Callable

import torch

from .tokens import align_right

RowChange = Callable[[torch.Tensor], torch.Tensor]


class LruState:
    """State of one RG-LRU block: the last C − 1 inputs of its convolution, and h in fp32.

    While the past is recorded both hold one entry more for each token fed since the last crop, so that a crop can go
    back to any of them.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(self, conv_width: int) -> None:
        self.kept_inputs = conv_width - 1
        self.record_past = False
        self.reset()

    def fork(self, record_past: bool) -> "LruState":
        """Another memory that continues from this one; nothing is written in place, so the two share what they have."""
        other = LruState(self.kept_inputs + 1)
        other.record_past, other.inputs, other.states = record_past, self.inputs, self.states
        return other

    def reset(self) -> None:
        self.inputs: torch.Tensor | None = None  # [B, C - 1 + recorded, R]
        self.states: torch.Tensor | None = None  # [B, 1 + recorded, R], the present one last

    def with_inputs(self, x: torch.Tensor, order: torch.Tensor | None = None) -> torch.Tensor:
        """The convolution's inputs: x `[B, T, R]` after the C − 1 stored ones, `[B, C - 1 + T, R]`."""
        stored = self.inputs if self.inputs is not None else x.new_zeros(x.shape[0], self.kept_inputs, x.shape[2])
        recorded = stored.shape[1] - self.kept_inputs
        everything = torch.cat([stored, x], dim=1)
        full = align_right(everything[:, recorded:], order, dim=1)
        # `order` comes from the last C - 1 stored inputs and the new ones, and moves nothing where there is no padding.
        if self.record_past:
            self.inputs = everything if order is None else torch.cat([everything[:, :recorded], full], dim=1)
        else:
            self.inputs = full[:, full.shape[1] - self.kept_inputs :].clone()
        return full

    def state(self) -> torch.Tensor | None:
        """h after the last token, `[B, R]`; None before the first."""
        return None if self.states is None else self.states[:, -1]

    def store_states(self, h: torch.Tensor) -> None:
        """Keep what is needed of the states `[B, T, R]` of new tokens."""
        if self.record_past:
            before = self.states if self.states is not None else h.new_zeros(h.shape[0], 1, h.shape[2])
            self.states = torch.cat([before, h], dim=1)
        else:
            self.states = h[:, -1:].clone()

    @property
    def recorded(self) -> int:
        return self.states.shape[1] - 1 if self.states is not None else 0

    def crop(self, tokens_to_remove: int) -> None:
        if self.states is None or self.inputs is None:
            return
        present = self.states.shape[1] - abs(tokens_to_remove)
        last_input = self.inputs.shape[1] - abs(tokens_to_remove)
        self.states = self.states[:, present - 1 : present].clone()
        self.inputs = self.inputs[:, last_input - self.kept_inputs : last_input].clone()

    def memory_bytes(self) -> int:
        return sum(part.untyped_storage().nbytes() for part in (self.inputs, self.states) if part is not None)

    def get_max_length(self) -> int:
        return -1

    def map_rows(self, change: RowChange) -> None:
        if self.inputs is not None:
            self.inputs = change(self.inputs)
        if self.states is not None:
            self.states = change(self.states)
