"""Everything that a RecurrentGemma model remembers between calls.

Stored tokens are aligned to the right: a row with less to remember than another has its gap at the left, where nothing
reads. Shapes: B batch, T new tokens, S stored tokens, G key/value heads, K head_dim.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from redepth.modeling.errors import UserError
from redepth.modeling.lru_mixer import Timeline
from redepth.modeling.lru_state import LruState, RowChange
from redepth.modeling.tokens import align_right


class WindowLayer(CacheLayerMixin):
    """Keys and values that an attention window still reaches, `[B, G, S, K]`, S < window.

    They lie side by side in storage a quarter larger than the window and are moved to its front when it is full, so that
    decoding neither copies the window at every token nor grows.
    """

    is_sliding = True
    is_croppable = True

    def __init__(self, window: int) -> None:
        super().__init__()
        self.kept = window - 1
        self.room = max(window // 4, 16)
        self.start = self.end = 0
        self.record_past = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys = key_states[:, :, :0]
        self.values = value_states[:, :, :0]
        self.is_initialized = True

    @property
    def stored(self) -> int:
        return self.end - self.start

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, order: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new keys and values, and return them after the stored ones, `[B, G, S + T, K]`.

        Args:
            key_states, value_states: `[B, G, T, K]`.
            order: `[B, S + T]`, how stored and new tokens are to be reordered, where some rows bring padding.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        tokens = key_states.shape[2]
        # Writing in place would break the graph of a pass that is still to be differentiated.
        in_place = not (self.record_past or key_states.requires_grad or self.keys.requires_grad)
        if in_place and order is None and tokens <= self.room:
            return self._append(key_states, value_states)
        both = []
        for name, new in (("keys", key_states), ("values", value_states)):
            rows = getattr(self, name)
            rows = torch.cat([rows[:, :, self.start : self.end], new], dim=2) if self.stored else new
            both.append(align_right(rows, order, dim=2))
        total = both[0].shape[2]
        keep = total if self.record_past else min(total, self.kept)
        # A clone, so that a long prompt is not held by its last tokens.
        self.keys, self.values = (rows[:, :, total - keep :] for rows in both)
        if in_place:
            self.keys, self.values = self.keys.clone(), self.values.clone()
        self.start, self.end = 0, keep
        return both[0], both[1]

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None
        assert self.values is not None
        end = self.end + key_states.shape[2]
        if end > self.keys.shape[2]:
            capacity = self.kept + self.room
            for name in ("keys", "values"):
                old = getattr(self, name)
                new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
                new[:, :, : self.stored] = old[:, :, self.start : self.end]
                setattr(self, name, new)
            self.start, self.end = 0, self.stored
            end = self.end + key_states.shape[2]
        assert self.keys is not None
        assert self.values is not None
        self.keys[:, :, self.end : end] = key_states
        self.values[:, :, self.end : end] = value_states
        start, self.end = self.start, end
        self.start = max(start, end - self.kept)
        return self.keys[:, :, start:end], self.values[:, :, start:end]

    def crop(self, tokens_to_remove: int) -> None:
        self.end = max(self.end - abs(tokens_to_remove), self.start)
        self.start = max(self.start, self.end - self.kept)

    def memory_bytes(self) -> int:
        return sum(part.untyped_storage().nbytes() for part in (self.keys, self.values) if part is not None)

    def get_seq_length(self) -> int:
        return self.stored

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.stored + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.keys = self.values = None
        self.start = self.end = 0
        self.is_initialized = False

    def map_rows(self, change: RowChange) -> None:
        if self.is_initialized:
            assert self.keys is not None
            assert self.values is not None
            self.keys, self.values = change(self.keys), change(self.values)


def cache_signature(config: Any) -> tuple[Any, ...]:
    """What a cache's layers depend on: two models may share a cache's layout only where these agree."""
    heads = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    window = config.attention_window_size
    return tuple(config.block_types), config.num_hidden_layers, config.lru_width, config.conv1d_width, window, heads


class RecurrentGemmaCache(Cache):
    """The memory of one generation: nothing of it is on the model, and it does not grow with the text.

    `crop` needs what a fixed-size state has forgotten: call `activate_past_recording()` first, as transformers'
    assisted decoding does, and every token's states are kept until the next crop.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: Any) -> None:
        types = [config.block_types[i % len(config.block_types)] for i in range(config.num_hidden_layers)]
        self.signature = cache_signature(config)
        window, taps = config.attention_window_size, config.conv1d_width
        layers: list[Any] = [WindowLayer(window) if kind == "attention" else LruState(taps) for kind in types]
        super().__init__(layers=layers)
        self.kept = config.attention_window_size - 1
        self.recording = False
        self._start_over()

    def _start_over(self) -> None:
        self.length = 0
        self.batch: int | None = None
        # How many tokens were not padding, and how many of these are in the row's current document; None while all,
        # [B].
        self.real_tokens: torch.Tensor | None = None
        self.document_tokens: torch.Tensor | None = None
        # Columns that a crop may still remove.
        self.croppable = 0

    @property
    def _own_layers(self) -> list[Any]:
        """The layers, with the methods that transformers' do not have."""
        return self.layers

    @property
    def stored(self) -> int:
        """S: how many columns of keys and values the attention layers hold."""
        return next((layer.stored for layer in self.layers if isinstance(layer, WindowLayer)), 0)

    def commit(self, batch: int, tokens: int, timeline: Timeline, document_tokens: torch.Tensor | None) -> None:
        """End a pass over `[batch, tokens]`.

        Args:
            timeline: where texts start and padding stands in it.
            document_tokens: `[B]`, tokens of the current document; None if all are.
        """
        mask = timeline.real
        if self.real_tokens is not None or mask is not None:
            device = mask.device if mask is not None else self.real_tokens.device  # type: ignore[union-attr]
            before = self.real_counts(batch, device)
            self.real_tokens = before + (tokens if mask is None else mask.sum(1))
        self.document_tokens = document_tokens
        self.length += tokens
        self.batch = batch
        if not self.recording:
            self.croppable = 0
        elif document_tokens is not None:
            # What stands left of another document can't be told from a plain count of columns any more.
            self.croppable = 0
        else:
            self.croppable = timeline.croppable_after(self.croppable, tokens)

    def real_counts(self, batch: int, device: torch.device) -> torch.Tensor:
        """`[B]`: stored tokens that were not padding."""
        return torch.full((batch,), self.length, device=device) if self.real_tokens is None else self.real_tokens

    def document_counts(self, batch: int, device: torch.device) -> torch.Tensor:
        """`[B]`: tokens of each row's current document stored so far."""
        return self.real_counts(batch, device) if self.document_tokens is None else self.document_tokens

    def activate_past_recording(self) -> None:
        """Keep every token's states until the next crop."""
        self.recording = True
        for layer in self._own_layers:
            layer.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, so that the cache is as if they had never been fed, and stop keeping their past.

        Raises:
            ValueError: for a positive number (transformers counts tokens to remove as a negative one), for more tokens
                than were recorded, and for padding.
        """
        if tokens_to_remove > 0:
            raise UserError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        remove = -tokens_to_remove
        if remove > self.croppable:
            raise UserError(
                f"can't crop {remove} tokens: {self.croppable} were recorded since the last crop or padding; "
                "call activate_past_recording() before feeding them"
            )
        if not self.recording:
            return
        for layer in self._own_layers:
            layer.crop(tokens_to_remove)
        self.length += tokens_to_remove
        self.croppable = 0
        for name in ("real_tokens", "document_tokens"):
            counts = getattr(self, name)
            if counts is not None:
                setattr(self, name, counts + tokens_to_remove)

    def memory_bytes(self) -> int:
        """Bytes held by all layers, reserved room included."""
        return sum(layer.memory_bytes() for layer in self._own_layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.stored

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.stored + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def is_croppable(self) -> bool:
        return self.recording

    @property
    def batch_size(self) -> int:
        return -1 if self.batch is None else self.batch

    def reset(self) -> None:
        super().reset()
        self._start_over()

    def _map_rows(self, change: RowChange) -> None:
        for layer in self._own_layers:
            layer.map_rows(change)
        for name in ("real_tokens", "document_tokens"):
            counts = getattr(self, name)
            if counts is not None:
                setattr(self, name, change(counts))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))
        self.batch = None if self.batch is None else self.batch * repeats

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map_rows(lambda rows: rows[indices])
        if self.batch is not None:
            self.batch = len(torch.arange(self.batch)[indices.cpu()])
