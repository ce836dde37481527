"""Keys and values of one layer at one step, of a depth-recurrent model's cache."""

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from .tokens import TokenSubset


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

    def update_subset(
        self, key_states: torch.Tensor, value_states: torch.Tensor, start: int, subset: TokenSubset
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the chosen tokens of a pass that begins at position `start`; where nothing was written, zeros stand.

        Args:
            key_states, value_states: `[rows, kv_heads, places, head_dim]`.

        Returns:
            the chosen rows' keys and values up to the end of the pass, `[rows, kv_heads, tokens, head_dim]`.
        """
        if not self.is_initialized:
            self._start_empty(subset.batch, key_states, value_states)
        places = start + subset.positions
        end = start + subset.tokens
        self._extend(end)
        assert self.keys is not None
        assert self.values is not None
        rows = subset.rows[:, None].expand_as(places)[subset.real]
        self.keys[rows, :, places[subset.real]] = key_states.transpose(1, 2)[subset.real]
        self.values[rows, :, places[subset.real]] = value_states.transpose(1, 2)[subset.real]
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        # A view where every row is there; a copy where some have left.
        return (keys, values) if len(subset.rows) == len(keys) else (keys[subset.rows], values[subset.rows])

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
