"""Training attention on a processor: torch's forward kernel, and a backward pass through matrix products."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

QUERIES_AT_ONCE = 128


def gains_from_own_backward(implementation: str | None, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether `ProcessorAttention` is the faster choice where `value` `[B, G, T, K]` is read, and can honour the mask."""
    return (
        implementation == "sdpa"
        and value.device.type == "cpu"
        and value.dtype == torch.bfloat16
        and value.requires_grad
        and torch.is_grad_enabled()
        and (mask is None or mask.dtype == torch.bool)
    )


class ProcessorAttention(torch.autograd.Function):
    """Causal attention whose gradients are written out, some queries at a time (Dao et al. 2022, algorithm 4).

    torch's own backward kernel for processors makes little use of their bf16 matrix units; at rows of 256 to 512 tokens
    this one takes about half its time. Only inputs and output are kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        """`query` is `[B, H, T, K]`, `key` and `value` `[B, G, T, K]`, the mask None (causal) or bool `[B or 1, 1, T,
        T]`.

        Returns `[B, H, T, K]`.
        """
        grouped = key.shape[1] != query.shape[1]
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
        ctx.save_for_backward(query, key, value, mask, mixed)
        ctx.scaling = scaling
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, mask, mixed = ctx.saved_tensors
        tokens, groups = query.shape[2], key.shape[1]
        per_group = query.shape[1] // groups
        # Σ_s p_ts · (d loss / d p_ts), which the derivative of softmax subtracts: [B, H, T, 1].
        common = (grad.float() * mixed.float()).sum(-1, keepdim=True).to(grad.dtype)
        # The queries of a group lie side by side, so that each group is one product: [B, G, H / G, T, K].
        query, grad, common = ((part.unflatten(1, (groups, per_group))) for part in (query * ctx.scaling, grad, common))
        key, value = key.contiguous(), value.contiguous()
        query_grad = torch.empty_like(query, memory_format=torch.contiguous_format)
        key_grad, value_grad = torch.zeros_like(key), torch.zeros_like(value)
        for start in range(0, tokens, QUERIES_AT_ONCE):
            stop = min(start + QUERIES_AT_ONCE, tokens)
            rows = stop - start
            queries, queries_grad, queries_common = (
                part[:, :, :, start:stop].flatten(2, 3) for part in (query, grad, common)
            )
            keys, values = key[:, :, :stop], value[:, :, :stop]
            scores = (queries @ keys.transpose(2, 3)).unflatten(2, (per_group, rows))
            if mask is None:
                later = torch.ones(rows, rows, dtype=torch.bool, device=scores.device).triu(1)
                scores[..., start:].masked_fill_(later, torch.finfo(scores.dtype).min)
            else:
                scores.masked_fill_(~mask[:, :, None, start:stop, :stop], torch.finfo(scores.dtype).min)
            weights = torch.softmax(scores, dim=-1).flatten(2, 3)
            value_grad[:, :, :stop] += weights.transpose(2, 3) @ queries_grad
            scores_grad = (queries_grad @ values.transpose(2, 3)).sub_(queries_common).mul_(weights)
            key_grad[:, :, :stop] += scores_grad.transpose(2, 3) @ queries
            query_grad[:, :, :, start:stop] = (scores_grad @ keys).unflatten(2, (per_group, rows))
        return query_grad.mul_(ctx.scaling).flatten(1, 2), key_grad, value_grad, None, None
