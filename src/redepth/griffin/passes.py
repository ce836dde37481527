"""What the layers of one forward pass of a RecurrentGemma model share: padding, documents, masks and angles.

Shapes: B batch, T new tokens, S stored tokens, D width, K head_dim, C taps of the convolution.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from redepth.modeling.errors import UserError
from redepth.modeling.lru_mixer import Timeline
from redepth.modeling.rotary import for_halves, plain_frequencies
from redepth.modeling.tokens import align_right, padding_back, padding_first, stands_left, surely

from .cache import RecurrentGemmaCache


@dataclass
class Segment:
    """Queries that attend together, the keys that they can reach, and the mask between them (None: causal or all)."""

    queries: slice
    keys: slice
    mask: torch.Tensor | None


@dataclass
class Pass:
    """What every layer of one forward pass shares. Tokens are columns; padding stands left of a row's tokens."""

    cos: torch.Tensor  # [B or 1, T, rotated channels]
    sin: torch.Tensor
    segments: list[Segment]
    cache: RecurrentGemmaCache | None
    timeline: Timeline
    # The reordering that puts new padding left of the stored keys, `[B, S + T]`.
    key_order: torch.Tensor | None = None
    # How the caller's columns are read from these, `[B, T]`; None if they are the same.
    restore: torch.Tensor | None = None
    attentions: list[torch.Tensor] | None = None
    # For the cache at the end of the pass.
    document_tokens: torch.Tensor | None = field(default=None, repr=False)


def rotations(config: Any, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the rotary angles, `[B or 1, T, rotated channels]`, see `for_halves`."""
    parameters = config.rope_parameters
    if parameters.get("rope_type", "default") != "default":
        raise UserError(f"rope_type is {parameters['rope_type']!r}, but RecurrentGemma knows only 'default'")
    rotated = int(config.hidden_size // config.num_attention_heads * parameters.get("partial_rotary_factor", 1.0))
    frequencies = plain_frequencies(parameters["rope_theta"], rotated, position_ids.device)
    angles = position_ids[..., None].float() * frequencies
    return for_halves(angles.cos().to(dtype), angles.sin().to(dtype))


def attention_segments(
    tokens: int,
    stored: int,
    window: int,
    device: torch.device,
    first_visible: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    explicit: bool = False,
    whole: bool = False,
) -> list[Segment]:
    """Cut the queries so that each part is compared with the keys in reach only: time grows with T · window, not T².

    Args:
        tokens, stored: T and S; query t stands at column S + t of the keys.
        first_visible: `[B]`, the first column that a row may read, where rows differ.
        documents: `[B, T]`, the document of each new token; stored ones belong to document 0.
        explicit: whether the attention function needs a mask even where all is causal.
        whole: all queries and keys in one segment.
    """

    def mask(queries: slice, keys: slice) -> torch.Tensor:
        query = torch.arange(stored + queries.start, stored + queries.stop, device=device)[:, None]
        key = torch.arange(keys.start, keys.stop, device=device)
        allowed = ((key <= query) & (key > query - window))[None, None]
        if first_visible is not None:
            allowed = allowed & (key >= first_visible[:, None])[:, None, None]
        if documents is not None:
            of_key = nn.functional.pad(documents, (stored, 0))[:, keys]
            allowed = allowed & (documents[:, queries, None] == of_key[:, None, :])[:, None]
        # Padding sees itself: the softmax of an empty row is not a number.
        return allowed | (key == query)

    if whole:
        everything = slice(0, tokens), slice(0, stored + tokens)
        return [Segment(*everything, mask(*everything))]
    same_for_rows = first_visible is None and documents is None
    if tokens == 1:
        queries, keys = slice(0, 1), slice(max(0, stored + 1 - window), stored + 1)
        return [Segment(queries, keys, None if same_for_rows else mask(queries, keys))]
    step = min(max(window // 4, 128), 512)
    segments: list[Segment] = []
    start = 0
    if same_for_rows and stored == 0 and not explicit:
        # Within the first window a causal mask is enough, and the kernels are fastest with it.
        start = min(window, tokens)
        segments.append(Segment(slice(0, start), slice(0, start), None))
    known: dict[tuple[int, int, int], torch.Tensor] = {}
    while start < tokens:
        stop = min(start + step, tokens)
        queries, keys = slice(start, stop), slice(max(0, stored + start + 1 - window), stored + stop)
        # Without differences between rows a mask depends on the segment's shape alone.
        shape = (stop - start, keys.stop - keys.start, stored + start - keys.start)
        if not same_for_rows or shape not in known:
            known[shape] = mask(queries, keys)
        segments.append(Segment(queries, keys, known[shape]))
        start = stop
    return segments


def real_columns(
    attention_mask: torch.Tensor | None, cache: RecurrentGemmaCache | None, batch: int, tokens: int
) -> torch.Tensor | None:
    """`[B, T]`, which new columns are tokens; None if all are.

    Raises:
        ValueError: for a mask that can't be honoured.
    """
    if attention_mask is None:
        return None
    past = cache.length if cache is not None else 0
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        raise UserError("attention_mask must be [batch, tokens]; a recurrence supports no other kind")
    if attention_mask.shape != (batch, past + tokens):
        raise UserError(
            f"attention_mask has shape {list(attention_mask.shape)}, but {past} stored and {tokens} new tokens in "
            f"{batch} rows need [{batch}, {past + tokens}]"
        )
    mask = attention_mask.bool()
    padded_before = cache is not None and cache.real_tokens is not None
    if not padded_before and surely(mask.all()):
        return None
    if cache is not None and past:
        stored = cache.real_counts(batch, mask.device)
        if surely((mask[:, :past].sum(1) != stored).any()):
            raise UserError("attention_mask differs from the one under which the stored tokens were read")
    real = mask[:, past:]
    return None if surely(real.all()) else real


def prepare(
    config: Any,
    x: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: RecurrentGemmaCache | None,
    whole: bool,
) -> tuple[torch.Tensor, Pass]:
    """x `[B, T, D]` with its padding moved to the left, and what the layers share."""
    batch, tokens, _ = x.shape
    device, window = x.device, config.attention_window_size
    past = cache.length if cache is not None else 0
    stored = cache.stored if cache is not None else 0
    real = real_columns(attention_mask, cache, batch, tokens)
    if position_ids is not None:
        if position_ids.shape not in ((1, tokens), (batch, tokens)):
            raise UserError(f"position_ids has shape {list(position_ids.shape)}, but must be [{batch}, {tokens}]")
        position_ids = position_ids.expand(batch, -1)

    restore = given = None
    if real is not None:
        order = padding_first(real)
        if not stands_left(order):
            restore = padding_back(real)
            x = align_right(x, order, dim=1)
            given, real = real, align_right(real, order, dim=1)
            position_ids = align_right(position_ids, order, dim=1) if position_ids is not None else None

    padded = real is not None or (cache is not None and cache.real_tokens is not None)
    several = cache is not None and cache.document_tokens is not None
    fresh, starts, documents, since_start, document_tokens = past == 0, None, None, None, None
    visible = torch.zeros(batch, dtype=torch.long, device=device)
    if position_ids is None and not padded and not several:
        position_ids = torch.arange(past, past + tokens, device=device)[None]
    else:
        everywhere = torch.ones(batch, tokens, dtype=torch.bool, device=device)
        column = real if real is not None else everywhere
        read = visible
        if cache is not None:
            visible, read = cache.document_counts(batch, device), cache.real_counts(batch, device)
        if position_ids is None:
            position_ids = (visible[:, None] + column.cumsum(1) - 1).clamp(min=0)
        starts = (position_ids == 0) & column
        before = read[:, None] + column.cumsum(1) - 1
        fresh = past == 0 and real is None and surely(starts[:, 0].all() & ~starts[:, 1:].any())
        if not surely(~(starts & (before > 0)).any()):
            documents = starts.cumsum(1)
            document_tokens = (column & (documents == documents[:, -1:])).sum(1)
            document_tokens = document_tokens + visible * (documents[:, -1] == 0)
        elif several:
            document_tokens = visible + column.sum(1)
        if document_tokens is not None:
            at = torch.arange(tokens, device=device)
            # The column where the stored document would start, were it not in the past.
            began = (tokens - column.sum(1) - visible)[:, None]
            since_start = at - torch.where(starts, at, began).cummax(1).values
        if fresh or surely(~starts.any()):
            starts = None

    input_order = key_order = first_visible = None
    if padded or several:
        new = real.sum(1) if real is not None else torch.full_like(visible, tokens)
        reachable = visible.clamp(max=stored)
        first_visible = stored + tokens - reachable - new
        if real is not None and past:
            taps = torch.ones(batch, config.conv1d_width - 1, dtype=torch.bool, device=device)
            input_order = padding_first(torch.cat([taps, real], 1))
            held = torch.arange(stored, device=device) >= (stored - reachable)[:, None]
            key_order = padding_first(torch.cat([held, real], 1))

    explicit = config._attn_implementation == "eager"
    segments = attention_segments(tokens, stored, window, device, first_visible, documents, explicit, whole)
    cos, sin = rotations(config, position_ids, x.dtype)
    shared = Pass(
        cos=cos,
        sin=sin,
        segments=segments,
        cache=cache,
        timeline=Timeline(fresh, starts, since_start, real, input_order, given),
        key_order=key_order,
        restore=restore,
        attentions=[] if whole else None,
        document_tokens=document_tokens,
    )
    return x, shared
