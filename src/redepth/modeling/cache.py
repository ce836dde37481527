"""Cache of a depth-recurrent model: one slot of keys and values per (layer, step), under a cache rule."""

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.utils import is_tracing

from .cache_rules import CacheRule, known_rule, parse_cache_rule
from .cache_slots import CacheSlot
from .errors import UserError
from .lru_mixer import Timeline
from .lru_slots import LruSlots
from .lru_state import LruState
from .tokens import TokenSubset, surely

# What a cache keeps for each row beside its slots.
ROW_WISE = ("steps_run", "padding_mask", "documents", "last_state")


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
        ValueError: for an unknown rule, and for one that recurrent layers do not support.
    """

    def __init__(self, config: Any, rule: str | None = None) -> None:
        self.slots: dict[tuple[int, int], CacheSlot] = {}
        super().__init__(layers=[])
        # By name: an exporter takes a cache apart into plain values and tensors.
        self.rule_name = parse_cache_rule(rule if rule is not None else config.cache_rule).name
        self.length = 0
        # Which stored tokens are padding, [batch, length]; None as long as none is known to be.
        self.padding_mask: torch.Tensor | None = None
        # Which document of its row each stored token belongs to, counted from 0, [batch, length]; None while all to
        # one.
        self.documents: torch.Tensor | None = None
        # The number of steps that each stored token ran, [batch, length].
        self.steps_run: torch.Tensor | None = None
        # s_r of each row's last token, [batch, 1, width], for a warm start; None after a crop.
        self.last_state: torch.Tensor | None = None
        # Beside keys and values, the states of recurrent layers; None where the model has none.
        self.lru: LruSlots | None = None
        if config.has_lru:
            if self.rule.missing != "refuse" and self.rule.name != "latest":
                raise UserError(
                    f"cache rule {self.rule.name!r} can't go with recurrent layers, whose states hold every token; use 'latest'"
                )
            self.lru = LruSlots(config.conv1d_width, stands_in=self.rule.missing == "latest")
        self._steps_in_pass = 0

    @property
    def rule(self) -> CacheRule:
        return known_rule(self.rule_name)

    @property
    def layers(self) -> list[Any]:
        """The slots as transformers counts layers, in the order of their first use."""
        return list(self.slots.values())

    @layers.setter
    def layers(self, value: list[Any]) -> None:
        """transformers sets an empty list at the start; the slots are all there is."""

    def check_steps(self, num_steps: int) -> None:
        """Refuse, before any compute, a depth that the stored tokens can't serve under this rule."""
        needed = self.rule.places(num_steps) if self.rule.missing == "refuse" else 1
        if self.steps_run is None or not self.length or is_tracing(self.steps_run):
            return
        shallowest = int(self.steps_run.min())
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
        past = []
        if self.steps_run is not None:
            past = [self.steps_run.expand(len(steps_in_pass), -1).to(steps_in_pass.device)]
        present = torch.cat([*past, steps_in_pass], dim=1) >= self.rule.place(step)
        return None if surely(present.all()) else present

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        step: int = 0,
        subset: TokenSubset | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new tokens' keys and values, and return all that they may read.

        Args:
            key_states, value_states: `[batch, kv_heads, new tokens, head_dim]`.
            layer_idx: the unique layer, counted through prelude, core and coda.
            step: the step, from 1, in the core; 0 in prelude and coda.
            subset: the tokens that these are, where they are not all of the pass.

        Returns:
            keys and values, `[batch, kv_heads, stored + new tokens, head_dim]`.
        """
        slot = self._enter(layer_idx, step, subset is not None)
        if subset is not None:
            return slot.update_subset(key_states, value_states, self.length, subset)
        return slot.update(key_states, value_states, self.length)

    def open_step(self, layers: range, step: int, tokens: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]] | None:
        """What some layers may read at a step of the core, by layer, with places for new tokens that the caller writes.

        Returns:
            keys and values, `[batch, kv_heads, stored + new tokens, head_dim]`; None where a layer holds nothing yet, and
            `update` has to make its storage.
        """
        slots = {layer: self._enter(layer, step) for layer in layers}
        if not all(slot.is_initialized for slot in slots.values()):
            return None
        return {layer: slot.open(self.length + tokens) for layer, slot in slots.items()}

    def open_layer(
        self,
        layer: int,
        step: int,
        new: torch.Tensor,
        kv_heads: int,
        head_dim: int,
        subset: TokenSubset | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A layer's keys and values at a step, with places for new tokens that the caller writes.

        Args:
            step: from 1 in the core, 0 elsewhere.
            new: `[batch, new tokens, …]`, of the dtype and device of what will be written.
            subset: the tokens that these are, where they are not all of the pass; what nobody writes is zero then.

        Returns:
            each `[batch, kv_heads, stored + new tokens, head_dim]`, of the same strides and with whole tokens in one piece;
            None where they are stored otherwise.
        """
        rows, tokens = new.shape[:2] if subset is None else (subset.batch, subset.tokens)
        slot = self._enter(layer, step, subset is not None)
        if not slot.is_initialized:
            none_yet = new.new_empty(rows, kv_heads, 0, head_dim)
            slot.lazy_initialization(none_yet, none_yet)
        if subset is not None:
            slot.extend(self.length + tokens)
        keys, values = slot.open(self.length + tokens)
        alike = keys.dtype == values.dtype == new.dtype and keys.device == new.device and len(keys) == rows
        whole = keys.stride() == values.stride() and keys.stride()[2:] == (head_dim, 1)
        return (keys, values) if alike and whole else None

    def _enter(self, layer: int, step: int, any_length: bool = False) -> CacheSlot:
        """The slot of a layer at a step that begins now.

        Args:
            any_length: whether the rows of this pass are at different places.
        """
        place = self.rule.place(step)
        slot = self._slot(layer, place)
        # The first step to use a place in this pass: tokens that never ran it are filled in from the step before.
        if self.rule.missing != "refuse" and 1 < step == place:
            shallower = self._slot(layer, step - 1)
            slot.fill_from(shallower, shallower.length if any_length else self.length)
        self._steps_in_pass = max(self._steps_in_pass, step)
        return slot

    @property
    def lru_slots(self) -> LruSlots:
        assert self.lru is not None
        return self.lru

    def lru_state(self, layer_idx: int, step: int, timeline: Timeline) -> LruState:
        """The memory of a recurrent layer at a step, which this pass advances; it takes the place of `update`."""
        self._steps_in_pass = max(self._steps_in_pass, step)
        return self.lru_slots.enter(layer_idx, self.rule.place(step), timeline)

    def _slot(self, layer: int, step: int) -> CacheSlot:
        if (layer, step) not in self.slots:
            self.slots[layer, step] = CacheSlot()
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
        self.steps_run = torch.cat([*past, steps_run.to(latent_states.device)], dim=1)
        self._remember_last(latent_states.detach())
        if self.lru is not None:
            self.lru.commit(tokens)
        self.length += tokens
        self._steps_in_pass = 0

    def settle(self, lengths: torch.Tensor, steps_run: torch.Tensor) -> None:
        """End a decoding in which the rows came to different lengths.

        Args:
            lengths: `[batch]`, how many stored tokens of each row are valid; the rest is padding.
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
        self.steps_run = torch.cat([self.steps_run, steps_run.to(self.steps_run.device)], dim=1)
        self.length, self.last_state, self._steps_in_pass = end, None, 0
        for slot in self.slots.values():
            slot.crop_to(end)

    def _remember_last(self, latent_states: torch.Tensor) -> None:
        if self.padding_mask is None:
            self.last_state = latent_states[:, -1:].clone()
            return
        real = self.padding_mask[:, -latent_states.shape[1] :].bool().to(latent_states.device)
        order = torch.arange(1, real.shape[1] + 1, device=real.device)
        last = (real * order).argmax(1)
        newest = latent_states[torch.arange(len(last), device=real.device), last][:, None]
        # A row of nothing but padding keeps what it had.
        kept = newest if self.last_state is None else self.last_state
        self.last_state = torch.where(real.any(1)[:, None, None], newest, kept)

    def extend_padding_mask(self, attention_mask: torch.Tensor | None, num_tokens: int) -> torch.Tensor | None:
        """The mask over stored and new tokens, `[batch, stored + new]`, remembering the padding of earlier calls."""
        if attention_mask is not None:
            self.padding_mask = attention_mask
        elif self.padding_mask is not None:
            past = self.padding_mask[:, : self.length]
            self.padding_mask = torch.cat([past, past.new_ones(past.shape[0], num_tokens)], dim=1)
        return self.padding_mask

    def extend_documents(self, starts: torch.Tensor | None, num_tokens: int) -> torch.Tensor | None:
        """The documents of stored and new tokens, `[batch, stored + new]`; None while there is one a row.

        Args:
            starts: `[batch, new]`, where another document begins; None where none does.
        """
        if starts is None and self.documents is None:
            return None
        if self.documents is not None:
            past = self.documents[:, : self.length]
        else:
            assert starts is not None
            past = torch.zeros(len(starts), self.length, dtype=torch.long, device=starts.device)
        last = past[:, -1:] if self.length else past.new_zeros(len(past), 1)
        new = last.expand(-1, num_tokens) if starts is None else last + starts.cumsum(1)
        self.documents = torch.cat([past, new], dim=1)
        return self.documents

    def memory_bytes(self) -> int:
        """Bytes held by keys, values and recurrent states, reserved room included."""
        states = self.lru.memory_bytes() if self.lru is not None else 0
        return states + sum(slot.memory_bytes() for slot in self.slots.values())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def is_croppable(self) -> bool:
        return self.lru is None or self.lru.recording

    def activate_past_recording(self) -> None:
        """Keep the recurrent layers' states of every token until the next crop; keys and values need no such record."""
        if self.lru is not None:
            self.lru.recording = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, so that the cache is as if they had never been fed.

        Raises:
            ValueError: for a positive number; transformers counts tokens to remove as a negative one. For tokens that
                recurrent layers did not record, see `activate_past_recording`.
        """
        if tokens_to_remove > 0:
            raise UserError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        if self.lru is not None:
            self.lru.crop(tokens_to_remove)
        if tokens_to_remove < 0:
            self.last_state = None
        self.length = max(self.length + tokens_to_remove, 0)
        for slot in self.slots.values():
            slot.crop_to(self.length)
        self._change(("steps_run", "padding_mask", "documents"), lambda tokens: tokens[:, : self.length])

    def reset(self) -> None:
        super().reset()
        self.slots.clear()
        if self.lru is not None:
            self.lru.reset()
        self.length = 0
        self._change(ROW_WISE, lambda kept: None)

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
        if self.lru is not None:
            self.lru.map_rows(change)

    def _change(self, names: tuple[str, ...], change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
        """Apply a change to everything kept in addition to the slots."""
        for name in names:
            kept = getattr(self, name)
            if kept is not None:
                setattr(self, name, change(kept))
