"""Attention by kind: written out, torch's own on a processor, or what transformers registers under a name.

Shapes: B batch, T new tokens, S stored and new tokens, H query heads, G key/value heads, K head_dim.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

QUERIES_AT_ONCE = 256  # where a mask is needed: only so many rows of it are ever written out


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out step by step, the only kind here that can soft-cap its scores (Gemma 2 report, section 2).

    `query` is `[B, H, T, K]`, `key` and `value` `[B, G, S, K]`, the mask `[B, 1, T, S]`, bool or additive;
    returns `[B, T, H, K]` and the probabilities `[B, H, T, S]`.
    """
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, dim=1).transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value.repeat_interleave(groups, dim=1)).transpose(1, 2), weights


def attention_map(
    layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """The probabilities `[B, H, T, S]`, which other attention than the eager one does not give."""
    if mask is None:  # all is causal
        new, stored = query.shape[2], key.shape[2]
        mask = torch.ones(new, stored, dtype=torch.bool, device=query.device).tril(stored - new)[None, None]
    return eager_attention(layer, query, key, value, mask, layer.scaling, softcap=layer.soft_cap)[1]


def processor_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """torch's own attention, without a copy of the keys for every query of a group.

    A single query's group stands side by side as if it were tokens: they read the same keys.

    Args:
        query: `[B, H, T, K]`; `key` and `value` `[B, G, S, K]`.
        mask: `[B or 1, 1, T, S]`, bool or additive; None where all is causal.

    Returns:
        `[B, T, H, K]`.
    """
    batch, heads, tokens, width = query.shape
    groups = key.shape[1]
    if tokens == 1:
        side_by_side = query.reshape(batch, groups, heads // groups, width)
        mixed = F.scaled_dot_product_attention(side_by_side, key, value, attn_mask=mask, scale=scaling)
        return mixed.reshape(batch, 1, heads, width)
    if mask is None and key.shape[2] > tokens:
        return _after_a_past(query, key, value, scaling)
    mixed = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=groups != heads
    )
    return mixed.transpose(1, 2)


def _after_a_past(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Causal attention of the last tokens of a text, `[B, T, H, K]`, in blocks that do not read the keys after them."""
    past = key.shape[2] - query.shape[2]
    mixed = []
    for start in range(0, query.shape[2], QUERIES_AT_ONCE):
        queries = query[:, :, start : start + QUERIES_AT_ONCE]
        rows, end = queries.shape[2], past + start + queries.shape[2]
        seen = torch.ones(rows, end, dtype=torch.bool, device=query.device).tril(end - rows)
        part = F.scaled_dot_product_attention(
            queries,
            key[:, :, :end],
            value[:, :, :end],
            attn_mask=seen,
            scale=scaling,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        mixed.append(part.transpose(1, 2))
    return torch.cat(mixed, dim=1)


def attend(
    layer: Any,
    kind: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
) -> torch.Tensor:
    """One layer's attention, `[B, T, H, K]`.

    Args:
        kind: as in transformers' `attn_implementation`.
        query: `[B, H, T, K]`; `key` and `value` `[B, G, S, K]`.
        mask: as that kind takes it.
    """
    if kind == "sdpa" and query.device.type == "cpu":
        return processor_attention(query, key, value, mask, layer.scaling)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(kind, eager_attention)
    # sdpa knows no soft cap and refuses even a None.
    cap = {} if layer.soft_cap is None else {"softcap": layer.soft_cap}
    return function(
        layer,
        query,
        key,
        value,
        mask,
        scaling=layer.scaling,
        dropout=0.0,
        sliding_window=layer.sliding_window,
        **cap,
    )[0]
