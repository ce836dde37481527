"""The recurrent layers' part of a depth-recurrent model's cache: one memory for every (layer, step).

Shapes: B batch, T new tokens, R width of the recurrence, C taps of the convolution.
"""

from dataclasses import dataclass

import torch

from .errors import UserError
from .lru_mixer import Timeline, scan_on
from .lru_state import LruState, RowChange
from .tokens import padding_back, padding_first, stands_left, surely


@dataclass
class TokenWrites:
    """What the tokens of a pass wrote into a recurrent layer, each at the last step that it ran, `[B, T, R]` each."""

    inputs: torch.Tensor  # of the convolution
    added: torch.Tensor  # √(1 − a²) (i x), in fp32
    decay: torch.Tensor  # a, in fp32


@dataclass
class ReadingOrder:
    """How a recurrent layer reads the columns of a pass: its padding moved to the left, and back again."""

    timeline: Timeline
    # `[B, T]`: the caller's columns with padding first, and where each went; None if they are in that order already.
    order: torch.Tensor | None = None
    restore: torch.Tensor | None = None


def reading_order(
    batch: int,
    tokens: int,
    past: int,
    taps: int,
    mask: torch.Tensor | None,
    documents: torch.Tensor | None,
    device: torch.device,
) -> ReadingOrder:
    """Where texts start and padding stands in one pass.

    Args:
        taps: C.
        mask: `[B, past + T]`, 1 for tokens and 0 for padding; None if all are tokens.
        documents: `[B, T]`, where another document begins; None if none does.

    Raises:
        ValueError: for another document in a row that holds padding too.
    """
    real = mask[:, -tokens:].bool() if mask is not None else None
    if documents is not None:
        if mask is not None and surely(~mask.bool().all()):
            raise UserError(
                "position_ids begin another document in a row with padding, which a recurrent layer can't honour; leave the "
                "padding out"
            )
        at = torch.arange(tokens, device=device)
        since_start = at - torch.where(documents, at, -past).cummax(1).values
        starts = documents
        if past == 0:
            starts = documents | (at == 0)
        return ReadingOrder(Timeline(starts=starts, since_start=since_start))
    if mask is None:
        return ReadingOrder(Timeline(fresh=past == 0))

    assert real is not None
    order = restore = input_order = given = None
    read = mask[:, :past].sum(1, keepdim=True)
    if surely(real.all()):
        starts = (read == 0) & (torch.arange(tokens, device=device) == 0)
        fresh = surely(starts[:, 0].all())
        return ReadingOrder(Timeline(fresh=fresh, starts=starts if not fresh and not surely(~starts.any()) else None))
    order = padding_first(real)
    if stands_left(order):
        order = None
    else:
        restore = padding_back(real)
        given, real = real, real.gather(1, order)
    starts = real & (read + real.cumsum(1) == 1)
    if past:
        held = torch.ones(batch, taps - 1, dtype=torch.bool, device=device)
        input_order = padding_first(torch.cat([held, real], 1))
    starts_or_none = None if surely(~starts.any()) else starts
    timeline = Timeline(starts=starts_or_none, real=real, input_order=input_order, given=given)
    return ReadingOrder(timeline, order, restore)


class LruSlots:
    """Memories of all recurrent layers, one for each step that the cache rule keeps.

    A pass reads what earlier passes left and writes elsewhere; `commit` makes the new entries the past. So a step may be run
    again, and the steps that share a memory under `ring-N` all start from the same one, as they do with keys.

    Under `latest` a token also counts at steps that it did not run: what it last wrote (its convolution's input, what it
    added to the state, and the factor by which it let the state decay) stands in, as its last keys and values do.

    Args:
        taps: C.
        stands_in: whether a token's last step stands in for the steps that it did not run.
    """

    def __init__(self, taps: int, stands_in: bool) -> None:
        self.taps = taps
        self.stands_in = stands_in
        self.recording = False
        self.reset()

    def reset(self) -> None:
        self.memories: dict[tuple[int, int], LruState] = {}
        # Tokens that a crop may still take back.
        self.croppable = 0
        self._start_pass()

    def _start_pass(self) -> None:
        self._next: dict[tuple[int, int], LruState] = {}
        self._writes: dict[int, TokenWrites] = {}
        # By layer, since a layer's is on that layer's device.
        self._timelines: dict[int, Timeline] = {}

    def enter(self, layer: int, place: int, timeline: Timeline) -> LruState:
        """The memory of `layer` at a step, which this pass advances.

        Args:
            place: which of the layer's memories the cache rule gives the step; 0 in prelude and coda.
        """
        self._timelines[layer] = timeline
        # Where no token ran this deep, all of them count with the deepest step that there is.
        deepest = next((self.memories[layer, p] for p in range(place, -1, -1) if (layer, p) in self.memories), None)
        memory = (deepest or LruState(self.taps)).fork(self.recording)
        self._next[layer, place] = memory
        return memory

    def writes_of(self, layer: int) -> TokenWrites:
        """What each token of the pass wrote at the last step that it ran."""
        return self._writes[layer]

    def write(self, layer: int, writes: TokenWrites) -> None:
        """Keep what a step wrote: it may have to stand in for deeper ones."""
        self._writes[layer] = writes

    def commit(self, tokens: int) -> None:
        """End a pass over `tokens` columns: what it left is now the past."""
        for (layer, place), memory in self.memories.items():
            if (layer, place) in self._next or layer not in self._writes:
                continue
            writes, moved, timeline = self._writes[layer], memory.fork(self.recording), self._timelines[layer]
            moved.with_inputs(writes.inputs, timeline.input_order)
            scan_on(writes.added, writes.decay, timeline, moved)
            self._next[layer, place] = moved
        self.memories |= self._next
        if not self.recording:
            self.croppable = 0
        else:
            timeline = next(iter(self._timelines.values()), Timeline())
            self.croppable = timeline.croppable_after(self.croppable, tokens)
        self._start_pass()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, of which every state was recorded; a negative number, as transformers counts them.

        Raises:
            ValueError: for tokens that were not recorded: a state can't be rolled back.
        """
        if -tokens_to_remove > self.croppable:
            raise UserError(
                f"can't crop {-tokens_to_remove} tokens: the recurrent layers recorded {self.croppable} since the last "
                "crop or padding; call activate_past_recording() before feeding them"
            )
        if self.recording:
            for memory in self.memories.values():
                memory.crop(tokens_to_remove)
            self.croppable = 0

    def map_rows(self, change: RowChange) -> None:
        for memory in self.memories.values():
            memory.map_rows(change)

    def memory_bytes(self) -> int:
        return sum(memory.memory_bytes() for memory in self.memories.values())
