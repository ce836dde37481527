"""The layers of RecurrentGemma (Griffin, De et al. 2024): recurrent block or windowed attention, then an mlp.

Shapes: B batch, T new tokens, S stored tokens, D width, H heads, G key/value heads, K head_dim.
"""

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from redepth.modeling.attention import eager_attention
from redepth.modeling.elementwise import RMSNorm, times
from redepth.modeling.lru_mixer import LruBlock
from redepth.modeling.lru_state import LruState
from redepth.modeling.rotary import rotate_half_style

from .cache import WindowLayer
from .configuration import block_type
from .passes import Pass


def with_start(layer: nn.Linear, std: float) -> nn.Linear:
    """Mark the deviation that `_init_weights` gives the layer; transformers shows it no module without own tensors."""
    layer.start_std = std  # type: ignore[assignment]
    return layer


class Attention(nn.Module):
    """Attention over a window of tokens, with grouped keys and partly rotated heads."""

    is_causal = True

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        kv_width = config.num_key_value_heads * self.head_dim
        width, bias, in_std = config.hidden_size, config.attention_bias, config.hidden_size**-0.5
        self.q_proj = with_start(nn.Linear(width, width, bias=bias), in_std)
        self.k_proj = with_start(nn.Linear(width, kv_width, bias=bias), in_std)
        self.v_proj = with_start(nn.Linear(width, kv_width, bias=bias), in_std)
        self.o_proj = with_start(nn.Linear(width, width), (config.final_w_init_variance_scale / width) ** 0.5)

    def forward(self, x: torch.Tensor, shared: Pass) -> torch.Tensor:
        """`x` is `[B, T, D]`; returns `[B, T, D]`."""
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = (rotate_half_style(part, shared.cos, shared.sin) for part in (query, key))
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if shared.cache is not None:
            layer = shared.cache.layers[self.layer_idx]
            assert isinstance(layer, WindowLayer)
            key, value = layer.update(key, value, shared.key_order)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        mixed = []
        for segment in shared.segments:
            part, weights = attend(
                self,
                query[:, :, segment.queries],
                key[:, :, segment.keys],
                value[:, :, segment.keys],
                segment.mask,
                scaling=self.head_dim**-0.5,
                dropout=self.config.attention_dropout if self.training else 0.0,
            )
            mixed.append(part)
            if shared.attentions is not None:
                shared.attentions.append(weights)
        return self.o_proj((mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=1)).flatten(2))


class Recurrence(LruBlock):
    """The recurrent block, from this model's configuration, with its memory in this model's cache."""

    def __init__(self, config: Any, layer: int) -> None:
        width, lru_width, heads = config.hidden_size, config.lru_width, config.num_attention_heads
        super().__init__(width, lru_width, heads, config.conv1d_width, config.hidden_activation)
        self.layer_idx = layer
        with_start(self.linear_y, width**-0.5)
        with_start(self.linear_x, width**-0.5)
        with_start(self.linear_out, (config.final_w_init_variance_scale / lru_width) ** 0.5)

    def forward(self, x: torch.Tensor, shared: Pass) -> torch.Tensor:  # type: ignore[override]
        """`x` is `[B, T, D]`; returns `[B, T, D]`."""
        layer = shared.cache.layers[self.layer_idx] if shared.cache is not None else None
        assert layer is None or isinstance(layer, LruState)
        return super().forward(x, shared.timeline, layer)


class MLP(nn.Module):
    """down(act(gate(x)) · up(x)); `intermediate_size` counts gate and up together."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.intermediate_size // 2
        self.gate_proj = nn.Linear(config.hidden_size, width)
        self.up_proj = nn.Linear(config.hidden_size, width)
        self.down_proj = nn.Linear(width, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(times(self.act_fn(self.gate_proj(x)), self.up_proj(x)))


class RecurrentGemmaLayer(GradientCheckpointingLayer):
    """One residual layer: a recurrent block or attention, then an mlp, each on a normed input."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        mixer = Recurrence if block_type(config, layer) == "recurrent" else Attention
        self.temporal_pre_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, one_plus=True)
        self.temporal_block = mixer(config, layer)
        self.channel_pre_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, one_plus=True)
        self.mlp_block = MLP(config)

    def forward(self, x: torch.Tensor, shared: Pass) -> torch.Tensor:
        """`x` is `[B, T, D]`; returns `[B, T, D]`."""
        x = x + self.temporal_block(self.temporal_pre_norm(x), shared)
        return x + self.mlp_block(self.channel_pre_norm(x))
