"""Keys and values of one layer at one step, of a depth-recurrent model's cache."""

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from .tokens import TokenSubset


class CacheSlot(CacheLayerMixin):
    """Keys and values of one layer at one step, `[batch, kv_heads, tokens, head_dim]`.

    The storage is contiguous and doubles when it is full, so that decoding does not copy the past at every token; `keys`
    and `values` are views of what is written.
    """

    is_croppable = True

    def __init__(self) -> None:
        self.length = 0
        self._storage: dict[str, torch.Tensor] = {}
        super().__init__()

    @property
    def keys(self) -> torch.Tensor | None:
        return self._written("keys")

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        self._store("keys", value)

    @property
    def values(self) -> torch.Tensor | None:
        return self._written("values")

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        self._store("values", value)

    def _written(self, name: str) -> torch.Tensor | None:
        return self._storage[name][:, :, : self.length] if name in self._storage else None

    def _store(self, name: str, value: torch.Tensor | None) -> None:
        """Put other storage in place; transformers sets both to None at the start."""
        if value is None:
            self._storage.pop(name, None)
        else:
            self._storage[name] = value

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._start_empty(len(key_states), key_states, value_states)

    def _start_empty(self, batch: int, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        for name, new in (("keys", key_states), ("values", value_states)):
            self._storage[name] = new.new_empty(batch, new.shape[1], 0, new.shape[3])
        self.is_initialized = True

    def _reserve(self, length: int) -> None:
        capacity = self._storage["keys"].shape[2]
        if length <= capacity:
            return
        # A first prefill gets exactly the room it needs; after that the room doubles.
        capacity = length if capacity == 0 else max(length, 2 * capacity)
        for name, old in self._storage.items():
            new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
            new[:, :, : self.length] = old[:, :, : self.length]
            self._storage[name] = new

    def _up_to(self, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._storage["keys"][:, :, :end], self._storage["values"][:, :, :end]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, start: int = 0, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write at positions `start …`, and return all keys and values up to the last one written."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[2]
        keys, values = self.open(start + tokens)
        keys.narrow(2, start, tokens).copy_(key_states)
        values.narrow(2, start, tokens).copy_(value_states)
        return keys, values

    def open(self, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values up to position `end`, with room for those that the caller writes."""
        self._reserve(end)
        self.length = max(self.length, end)
        return self._storage["keys"].narrow(2, 0, end), self._storage["values"].narrow(2, 0, end)

    def update_subset(
        self, key_states: torch.Tensor, value_states: torch.Tensor, start: int, subset: TokenSubset
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the chosen tokens of a pass that begins at position `start`; what was never written is zero.

        Args:
            key_states, value_states: `[rows, kv_heads, places, head_dim]`.

        Returns:
            the chosen rows' keys and values up to the end of the pass, `[rows, kv_heads, tokens, head_dim]`.
        """
        if not self.is_initialized:
            self._start_empty(subset.batch, key_states, value_states)
        places = start + subset.positions
        end = start + subset.tokens
        self.extend(end)
        keys, values = self._up_to(end)
        rows = subset.rows[:, None].expand_as(places)[subset.real]
        keys[rows, :, places[subset.real]] = key_states.transpose(1, 2)[subset.real]
        values[rows, :, places[subset.real]] = value_states.transpose(1, 2)[subset.real]
        # A view where every row is there; a copy where some have left.
        return (keys, values) if len(subset.rows) == len(keys) else (keys[subset.rows], values[subset.rows])

    def extend(self, end: int) -> None:
        """Reach to position `end`, with zeros where nothing is written: a masked entry must still be a number."""
        if end <= self.length:
            return
        self._reserve(end)
        for stored in self._up_to(end):
            stored[:, :, self.length :] = 0
        self.length = end

    def fill_from(self, shallower: "CacheSlot", end: int) -> None:
        """Let the shallower step's entries stand in for the tokens `self.length … end` that never ran this step."""
        if self.length >= end:
            return
        start = self.length
        keys, values = (part[:, :, start:] for part in shallower._up_to(end))
        self.update(keys, values, start)

    def memory_bytes(self) -> int:
        """Reserved room included."""
        return sum(part.nbytes for part in self._storage.values())

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
        self._storage.clear()
        self.length = 0
        self.is_initialized = False

    def _map_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._storage = {name: change(part) for name, part in self._storage.items()}

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map_rows(lambda rows: rows[indices.to(rows.device)])
