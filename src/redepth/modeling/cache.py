"""Cache of a depth-recurrent model: one slot of keys and values per (layer, step), under a cache rule."""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from .errors import UserError
from .lru_mixer import Timeline
from .lru_slots import RecurrentSlots
from .lru_state import RecurrentLayer

# What a cache keeps for each row beside its slots.
ROW_WISE = ("steps_run", "padding_mask", "last_state")
KNOWN_RULES = "full, latest, skip, ring-N, first-R-then-last, or latest or skip joined to one of the last two by a +"


@dataclass(frozen=True)
class CacheRule:
    """Which steps' keys and values are kept, and what an earlier token shows at a step that it never ran.

    Attributes:
        name: the rule as redepth writes it, such as `latest+ring-4`.
        missing: `refuse` such a token, let its `latest` step stand in, or `skip` it.
        ring: keep this many steps, step i in the place of step i − ring; 0 keeps all.
        first: keep this many steps and, in one more place, the last one; 0 keeps all.
    """

    name: str
    missing: str = "refuse"
    ring: int = 0
    first: int = 0

    def place(self, step: int) -> int:
        """Where step 1, 2, … is kept, counted from 1; step 0 stands for prelude and coda."""
        if self.ring and step:
            return (step - 1) % self.ring + 1
        return min(step, self.first + 1) if self.first else step

    def places(self, num_steps: int) -> int:
        """How many places `num_steps` steps take up."""
        return min(num_steps, self.ring or self.first + 1) if self.ring or self.first else num_steps


def _published_name(rule: str) -> str:
    """redepth's name for a rule of the published code, which counts layer-steps of Huginn's four core layers."""
    if rule == "compress-anchor":
        return "first-8-then-last"
    name = re.sub(r"^(latest|skip)-compress-", r"\1+compress-", rule.replace("latest-m4", "latest"))
    return re.sub(r"compress-s(\d+)$", lambda match: f"ring-{int(match[1]) / 4:g}", name)


def parse_cache_rule(rule: str) -> CacheRule:
    """The rule of that name, or of that published alias.

    Raises:
        ValueError: for a rule that redepth does not know.
    """
    name = _published_name(rule)
    parts = name.split("+")
    if name == "full":
        return CacheRule("full")
    missing = parts.pop(0) if parts[0] in ("latest", "skip") else "refuse"
    kept = re.fullmatch(r"(?:ring-(?P<ring>[1-9]\d*)|first-(?P<first>[1-9]\d*)-then-last)", "+".join(parts))
    if kept is not None:
        return CacheRule(name, missing, int(kept["ring"] or 0), int(kept["first"] or 0))
    if not parts:
        return CacheRule(name, missing)
    near = difflib.get_close_matches(
        rule, ("full", "latest", "skip", "ring-4", "latest+ring-4", "first-8-then-last"), 1
    )
    hint = f"did you mean {near[0]!r}?" if near else f"use {KNOWN_RULES}"
    raise UserError(f"unknown cache rule {rule!r}; {hint}")


@dataclass
class SomeTokens:
    """The tokens of a pass that are still in the loop, gathered row by row.

    Attributes:
        rows: `[rows]`, the rows of the batch that have such tokens.
        positions: `[rows, places]`, their positions in the pass; short rows are filled up with position 0.
        real: `[rows, places]`, which places are tokens and not filling.
        batch, tokens: the size of the whole pass.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    real: torch.Tensor
    batch: int
    tokens: int

    @classmethod
    def of(cls, active: torch.Tensor) -> "SomeTokens":
        """From `[batch, tokens]`, which tokens are in the loop; at least one must be."""
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


class CacheSlot(CacheLayerMixin):
    """Keys and values of one layer at one step, `[batch, kv_heads, tokens, head_dim]`.

    The storage is contiguous and doubles when it is full, so that decoding does not copy the past at every token.
    """

    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._start_empty(len(key_states), key_states, value_states)

    def _start_empty(self, batch: int, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys = key_states.new_empty(batch, key_states.shape[1], 0, key_states.shape[3])
        self.values = value_states.new_empty(batch, value_states.shape[1], 0, value_states.shape[3])
        self.is_initialized = True

    def _reserve(self, length: int) -> None:
        assert self.keys is not None and self.values is not None
        capacity = self.keys.shape[2]
        if length <= capacity:
            return
        # A first prefill is stored exactly; from then on room doubles.
        capacity = length if capacity == 0 else max(length, 2 * capacity)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
            new[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, new)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, start: int = 0, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write at positions `start …`, and return all keys and values up to the last one written."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = start + key_states.shape[2]
        self._reserve(end)
        assert self.keys is not None and self.values is not None
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        self.length = max(self.length, end)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def update_some(
        self, key_states: torch.Tensor, value_states: torch.Tensor, start: int, some: "SomeTokens"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the chosen tokens of a pass that begins at position `start`; where nothing was written, zeros stand.

        Args:
            key_states, value_states: `[rows, kv_heads, places, head_dim]`.

        Returns:
            the chosen rows' keys and values up to the end of the pass, `[rows, kv_heads, tokens, head_dim]`.
        """
        if not self.is_initialized:
            self._start_empty(some.batch, key_states, value_states)
        places = start + some.positions
        end = start + some.tokens
        self._extend(end)
        assert self.keys is not None
        assert self.values is not None
        rows = some.rows[:, None].expand_as(places)[some.real]
        self.keys[rows, :, places[some.real]] = key_states.transpose(1, 2)[some.real]
        self.values[rows, :, places[some.real]] = value_states.transpose(1, 2)[some.real]
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        # A view where every row is there; a copy where some have left.
        return (keys, values) if len(some.rows) == len(keys) else (keys[some.rows], values[some.rows])

    def _extend(self, end: int) -> None:
        """Reach to position `end`, with zeros where nothing is written: a masked entry must still be a number."""
        if end <= self.length:
            return
        self._reserve(end)
        assert self.keys is not None and self.values is not None
        self.keys[:, :, self.length : end] = 0
        self.values[:, :, self.length : end] = 0
        self.length = end

    def fill_from(self, shallower: "CacheSlot", end: int) -> None:
        """Let the shallower step's entries stand in for the tokens `self.length … end` that never ran this step."""
        if self.length >= end:
            return
        start = self.length
        assert shallower.keys is not None and shallower.values is not None
        self.update(shallower.keys[:, :, start:end], shallower.values[:, :, start:end], start)

    def memory_bytes(self) -> int:
        if not self.is_initialized:
            return 0
        assert self.keys is not None and self.values is not None
        return self.keys.nbytes + self.values.nbytes

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def crop_to(self, length: int) -> None:
        self.length = min(self.length, length)

    def crop(self, tokens_to_remove: int) -> None:
        self.crop_to(self.length - abs(tokens_to_remove))

    def reset(self) -> None:
        self.keys = self.values = None
        self.length = 0
        self.is_initialized = False

    def _map_rows(self, change: Any) -> None:
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map_rows(lambda rows: rows[indices])


class RecurrentDepthCache(Cache):
    """Keys and values for every (layer, step), shared between steps as the cache rule says.

    At core layer l in step i a token reads its own key and value and, for each earlier token, those that the token
    stored at layer l in step j:

    - `full`: j = i; an earlier token that ran fewer steps is an error.
    - `latest`: the largest step ≤ i that the earlier token ran.
    - `skip`: j = i; an earlier token that ran fewer steps is not seen.
    - `ring-N`: the largest step that it ran with j ≡ i (mod N); only N steps are kept.
    - `first-R-then-last`: j = i up to R; from there on the last step that it ran; R + 1 steps are kept.
    - `latest+ring-N`, `skip+first-R-then-last`, …: for an earlier token that ran no such step, its last step, or nothing.

    Tokens that enter in one call run side by side, so where steps share a place they see each other's step i, not a later
    one. Prelude and coda have one entry a layer.

    Args:
        config: the model's configuration.
        rule: a cache rule or a published alias (`compress-s4`, `latest-m4`, …); the config's by default.

    Raises:
        ValueError: for an unknown rule, and for one that recurrent layers can't follow.
    """

    def __init__(self, config: Any, rule: str | None = None) -> None:
        super().__init__(layers=[])
        self.rule = parse_cache_rule(rule if rule is not None else config.cache_rule)
        self.slots: dict[tuple[int, int], CacheSlot] = {}
        self.length = 0
        # Which stored tokens are padding, [batch, length]; None while none is known to be.
        self.padding_mask: torch.Tensor | None = None
        # The number of steps that each stored token ran, [batch, length].
        self.steps_run: torch.Tensor | None = None
        # s_r of each row's last token, [batch, 1, width], for a warm start; None after a crop.
        self.last_state: torch.Tensor | None = None
        # Beside keys and values, the states of recurrent layers; None where the model has none.
        self.recurrent: RecurrentSlots | None = None
        if config.has_recurrence:
            if self.rule.missing != "refuse" and self.rule.name != "latest":
                raise UserError(
                    f"cache rule {self.rule.name!r} can't go with recurrent layers, whose states hold every token; use 'latest'"
                )
            self.recurrent = RecurrentSlots(config.conv1d_width, stands_in=self.rule.missing == "latest")
        self._steps_in_pass = 0

    def check_steps(self, num_steps: int) -> None:
        """Refuse, before any compute, a depth that the stored tokens can't serve under this rule."""
        needed = self.rule.places(num_steps) if self.rule.missing == "refuse" else 1
        shallowest = needed if self.steps_run is None or not self.length else int(self.steps_run.min())
        if shallowest < needed:
            raise UserError(
                f"num_steps={num_steps} under cache rule {self.rule.name!r} needs earlier tokens that ran at least {needed} "
                f"steps, but one ran {shallowest}; use cache_rule='latest' or start from an empty cache"
            )

    def visible(self, step: int, steps_in_pass: torch.Tensor) -> torch.Tensor | None:
        """Under `skip`, which tokens show themselves at a step of the core.

        Args:
            steps_in_pass: `[batch, new tokens]`, the steps that the new tokens have run, this one included.

        Returns:
            `[batch, stored + new tokens]`, bool; None where all do.
        """
        if self.rule.missing != "skip":
            return None
        past = [] if self.steps_run is None else [self.steps_run.expand(len(steps_in_pass), -1)]
        present = torch.cat([*past, steps_in_pass], dim=1) >= self.rule.place(step)
        return None if bool(present.all()) else present

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        step: int = 0,
        some: SomeTokens | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new tokens' keys and values, and return all that they may read.

        Args:
            key_states, value_states: `[batch, kv_heads, new tokens, head_dim]`.
            layer_idx: the unique layer, counted through prelude, core and coda.
            step: the step, from 1, in the core; 0 in prelude and coda.
            some: the tokens that these are, where they are not all of the pass.

        Returns:
            keys and values, `[batch, kv_heads, stored + new tokens, head_dim]`.
        """
        place = self.rule.place(step)
        slot = self._slot(layer_idx, place)
        # The first step to use a place in this pass: whoever never came so far is filled in from the step before.
        if self.rule.missing != "refuse" and 1 < step == place:
            shallower = self._slot(layer_idx, step - 1)
            slot.fill_from(shallower, shallower.length if some is not None else self.length)
        self._steps_in_pass = max(self._steps_in_pass, step)
        if some is not None:
            return slot.update_some(key_states, value_states, self.length, some)
        return slot.update(key_states, value_states, self.length)

    @property
    def recurrent_slots(self) -> RecurrentSlots:
        assert self.recurrent is not None
        return self.recurrent

    def recurrent_memory(self, layer_idx: int, step: int, timeline: Timeline) -> RecurrentLayer:
        """The memory of a recurrent layer at a step, to be moved on by this pass; `update` for such layers."""
        self._steps_in_pass = max(self._steps_in_pass, step)
        return self.recurrent_slots.enter(layer_idx, self.rule.place(step), timeline)

    def _slot(self, layer: int, step: int) -> CacheSlot:
        if (layer, step) not in self.slots:
            self.slots[layer, step] = CacheSlot()
            self.layers.append(self.slots[layer, step])
        return self.slots[layer, step]

    def commit(self, latent_states: torch.Tensor, steps_run: torch.Tensor | None = None) -> None:
        """End a pass: its tokens now belong to the past.

        Args:
            latent_states: s_r of the new tokens, `[batch, new tokens, width]`.
            steps_run: `[batch, new tokens]`, where they differ.
        """
        rows, tokens, _ = latent_states.shape
        if steps_run is None:
            steps_run = torch.full((rows, tokens), self._steps_in_pass, device=latent_states.device)
        past = [] if self.steps_run is None else [self.steps_run]
        self.steps_run = torch.cat([*past, steps_run], dim=1)
        self._remember_last(latent_states.detach())
        if self.recurrent is not None:
            self.recurrent.commit(tokens)
        self.length += tokens
        self._steps_in_pass = 0

    def settle(self, lengths: torch.Tensor, steps_run: torch.Tensor) -> None:
        """End a decoding in which the rows got differently far.

        Args:
            lengths: `[batch]`, the tokens of each row that are stored and right; beyond them it is padding.
            steps_run: `[batch, max(lengths) - stored tokens]`, of the tokens since the last commit.
        """
        past, end = self.length, int(lengths.max())
        real = torch.arange(end, device=lengths.device) < lengths[:, None]
        if self.padding_mask is not None:
            known = self.padding_mask[:, :past]
            self.padding_mask = torch.cat([known, real[:, past:].to(known.dtype)], dim=1)
        elif not bool(real.all()):
            self.padding_mask = real.long()
        assert self.steps_run is not None
        self.steps_run = torch.cat([self.steps_run, steps_run], dim=1)
        self.length, self.last_state, self._steps_in_pass = end, None, 0
        for slot in self.slots.values():
            slot.crop_to(end)

    def _remember_last(self, latent_states: torch.Tensor) -> None:
        if self.padding_mask is None:
            self.last_state = latent_states[:, -1:].clone()
            return
        real = self.padding_mask[:, -latent_states.shape[1] :].bool()
        order = torch.arange(1, real.shape[1] + 1, device=real.device)
        last = (real * order).argmax(1)
        found = latent_states[torch.arange(len(last), device=real.device), last][:, None]
        # A row of nothing but padding keeps what it had.
        kept = found if self.last_state is None else self.last_state
        self.last_state = torch.where(real.any(1)[:, None, None], found, kept)

    def extend_padding_mask(self, attention_mask: torch.Tensor | None, num_tokens: int) -> torch.Tensor | None:
        """The mask over stored and new tokens, `[batch, stored + new]`, remembering the padding of earlier calls."""
        if attention_mask is not None:
            self.padding_mask = attention_mask
        elif self.padding_mask is not None:
            past = self.padding_mask[:, : self.length]
            self.padding_mask = torch.cat([past, past.new_ones(past.shape[0], num_tokens)], dim=1)
        return self.padding_mask

    def memory_bytes(self) -> int:
        """Bytes held by keys, values and recurrent states, reserved room included."""
        states = self.recurrent.memory_bytes() if self.recurrent is not None else 0
        return states + sum(slot.memory_bytes() for slot in self.slots.values())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def is_croppable(self) -> bool:
        return self.recurrent is None or self.recurrent.recording

    def activate_past_recording(self) -> None:
        """Keep the recurrent layers' states of every token until the next crop; keys and values need nothing."""
        if self.recurrent is not None:
            self.recurrent.recording = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, so that the cache is as if they had never been fed.

        Raises:
            ValueError: for a positive number; transformers counts tokens to remove as a negative one. For tokens that
                recurrent layers did not record, see `activate_past_recording`.
        """
        if tokens_to_remove > 0:
            raise UserError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        if self.recurrent is not None:
            self.recurrent.crop(tokens_to_remove)
        if tokens_to_remove < 0:
            self.last_state = None
        self.length = max(self.length + tokens_to_remove, 0)
        for slot in self.slots.values():
            slot.crop_to(self.length)
        self._change(("steps_run", "padding_mask"), lambda tokens: tokens[:, : self.length])

    def reset(self) -> None:
        super().reset()
        self.slots.clear()
        self.layers.clear()
        if self.recurrent is not None:
            self.recurrent.reset()
        self.length, self.steps_run, self.padding_mask, self.last_state = 0, None, None, None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._change_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._change_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._change_rows(lambda rows: rows[indices])

    def _change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._change(ROW_WISE, change)
        if self.recurrent is not None:
            self.recurrent.map_rows(change)

    def _change(self, names: tuple[str, ...], change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply a change to what is kept beside the slots, where there is any."""
        for name in names:
            kept = getattr(self, name)
            if kept is not None:
                setattr(self, name, change(kept))
