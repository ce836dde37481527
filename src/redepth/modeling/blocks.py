"""One block for every family, switched by the configuration.

Shapes: B batch, T new tokens, S stored and new tokens, D width, H query heads, G key/value heads, K head_dim.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import attend, attention_map
from .attention_backward import ProcessorAttention, gains_from_own_backward
from .configuration import RecurrentDepthConfig
from .elementwise import RMSNorm, times
from .few_tokens import product_by, run_block
from .fields import LRU_LAYER
from .lru_mixer import LruBlock, Timeline, scan_on
from .lru_slots import TokenWrites
from .passes import PassContext
from .rotary import ROTATE
from .tokens import TokenSubset, align_right


def norm(config: RecurrentDepthConfig, width: int) -> RMSNorm:
    """The family's norm over `width` channels."""
    return RMSNorm(width, config.norm_eps, config.norm_weight == "one_plus")


class Attention(nn.Module):
    """Causal attention with q, k and v in one projection, grouped keys, rotary positions and the families' switches."""

    is_causal = True

    def __init__(self, config: RecurrentDepthConfig, layer: int) -> None:
        super().__init__()
        assert config.head_dim is not None and config.num_key_value_heads is not None
        self.config = config
        self.few_token_kernels = False  # as the block's
        self.layer_idx = layer
        self.layer_type = config.layer_type(layer)
        self.has_rope = config.layer_has_rope(layer)
        self.rotate = ROTATE[config.rope_style]
        self.head_dim = config.head_dim
        self.q_width = config.n_heads * config.head_dim
        self.kv_width = config.num_key_value_heads * config.head_dim
        self.kv_heads = config.num_key_value_heads
        self.num_key_value_groups = config.n_heads // config.num_key_value_heads
        self.scaling = config.query_scale if config.query_scale is not None else config.head_dim**-0.5
        self.sliding_window = config.sliding_window if self.layer_type == "sliding_attention" else None
        self.soft_cap = config.attn_logit_softcapping
        # Whether nothing but a rotation happens to q and k, so that both turn at once.
        self.only_turns = config.qk_norm is None and not config.qk_bias

        self.Wqkv = nn.Linear(config.n_embd, self.q_width + 2 * self.kv_width, bias=config.qkv_bias)
        self.proj = nn.Linear(self.q_width, config.n_embd, bias=config.proj_bias)
        self.proj.fresh_start = "narrow"  # type: ignore[assignment]
        if config.qk_bias:
            self.qk_bias = nn.Parameter(torch.zeros(2, 1, config.n_heads, config.head_dim))
        if config.qk_norm is not None:
            full = config.qk_norm == "full"
            self.q_norm = norm(config, self.q_width if full else self.head_dim)
            self.k_norm = norm(config, self.kv_width if full else self.head_dim)

    def forward(self, x: torch.Tensor, context: PassContext, step: int) -> torch.Tensor:
        """`x` is `[B, T, D]`; `step` counts from 1 in the core and is 0 elsewhere. Returns `[B, T, D]`."""
        qkv, proj = (product_by(part, self.few_token_kernels) for part in (self.Wqkv, self.proj))
        if self.only_turns:
            heads = qkv(x).view(*x.shape[:-1], -1, self.head_dim)
            both, value = heads.split([heads.shape[2] - self.kv_heads, self.kv_heads], dim=2)
            query, key = self._turned(both, context).split([both.shape[2] - self.kv_heads, self.kv_heads], dim=2)
        else:
            query, key, value = qkv(x).split([self.q_width, self.kv_width, self.kv_width], dim=-1)
            if self.config.qk_norm == "full":
                query, key = self.q_norm(query), self.k_norm(key)
            query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in (query, key, value))
            if self.config.qk_norm == "head":
                query, key = self.q_norm(query), self.k_norm(key)
            if self.config.qk_bias:
                query = query + self.qk_bias[0].to(query.dtype)
                key = key + self.qk_bias[1].to(key.dtype)
            query, key = self._turned(query, context), self._turned(key, context)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if context.attend is not None:
            return proj(context.attend(self, query, key, value).flatten(2))
        if context.cache is not None:
            key, value = context.cache.update(key, value, self.layer_idx, step, context.subset)
        mask = context.masks[self.layer_type]
        if context.wants("attention-map", self.layer_idx, step):
            context.watched("attention-map", self.layer_idx, step, attention_map(self, query, key, value, mask))
        if context.cache is None and gains_from_own_backward(context.attention, value, mask):
            # Norms of q and k widen them under autocast; v has the dtype of the products.
            query, key = query.to(value.dtype), key.to(value.dtype)
            mixed = ProcessorAttention.apply(query, key, value, mask, self.scaling)
            return proj(mixed.transpose(1, 2).flatten(2))
        return proj(attend(self, context.attention, query, key, value, mask).flatten(2))

    def _turned(self, x: torch.Tensor, context: PassContext) -> torch.Tensor:
        """Queries or keys `[B, T, heads, K]` with their positions in them, on layers that have any."""
        return self.rotate(x, *context.rotations[self.layer_type]) if self.has_rope else x


class LruMixer(LruBlock):
    """Griffin's recurrent block in place of attention: recurrent in time, and in the core with a state for each step."""

    def __init__(self, config: RecurrentDepthConfig, layer: int) -> None:
        assert config.lru_width is not None
        super().__init__(config.n_embd, config.lru_width, config.n_heads, config.conv1d_width, config.activation)
        self.layer_idx = layer
        self.linear_out.fresh_start = "narrow"  # type: ignore[assignment]

    def forward(self, x: torch.Tensor, context: PassContext, step: int) -> torch.Tensor:  # type: ignore[override]
        """`x` is `[B, T, D]`; `step` counts from 1 in the core and is 0 elsewhere. Returns `[B, T, D]`."""
        reading, cache = context.reading, context.cache
        assert reading is not None
        if context.subset is not None:
            return self._mix_subset(x, context, context.subset, step)
        timeline = reading.timeline
        memory = cache.lru_state(self.layer_idx, step, timeline) if cache is not None else None
        if cache is None or not cache.lru_slots.stands_in:
            x = super().forward(align_right(x, reading.order, dim=1), timeline, memory)
            return align_right(x, reading.restore, dim=1)
        gate = self.act_fn(self.linear_y(x))
        inputs = align_right(self.linear_x(x), reading.order, dim=1)
        if timeline.real is not None:
            inputs = inputs * timeline.real[..., None]
        mixed = self.conv_1d(self.with_past(inputs, timeline, memory), timeline)
        added, decay = self.rg_lru(mixed, timeline)
        h = scan_on(added, decay, timeline, memory)
        cache.lru_slots.write(self.layer_idx, TokenWrites(inputs, added, decay))
        return self.linear_out(times(gate, align_right(h, reading.restore, dim=1).to(gate.dtype)))

    def _mix_subset(self, x: torch.Tensor, context: PassContext, subset: TokenSubset, step: int) -> torch.Tensor:
        """The tokens still in the loop, `[rows, places, D]`, beside those that have left, whose last entries stay."""
        reading, cache = context.reading, context.cache
        assert reading is not None
        assert cache is not None
        timeline, slots = reading.timeline, cache.lru_slots
        rows = subset.rows[:, None].expand_as(subset.positions)
        at = subset.positions if reading.restore is None else reading.restore[rows, subset.positions]
        # One entry for each token, without the fillers.
        where = rows[subset.real], at[subset.real]
        before = slots.writes_of(self.layer_idx)
        inputs = before.inputs.index_put(where, self.linear_x(x)[subset.real])
        memory = cache.lru_state(self.layer_idx, step, timeline)
        mixed = self.conv_1d(self.with_past(inputs, timeline, memory), timeline)[where]
        starts = where[1] == 0 if timeline.fresh else timeline.starts[where] if timeline.starts is not None else None
        added, decay = self.rg_lru(mixed[None], Timeline(starts=starts[None] if starts is not None else None))
        added, decay = before.added.index_put(where, added[0]), before.decay.index_put(where, decay[0])
        h = scan_on(added, decay, timeline, memory)[rows, at]
        slots.write(self.layer_idx, TokenWrites(inputs, added, decay))
        return self.linear_out(times(self.act_fn(self.linear_y(x)), h.to(x.dtype)))


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) with gate and up in one projection, gate first (Shazeer 2020)."""

    def __init__(self, config: RecurrentDepthConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=config.mlp_bias)
        self.act = ACT2FN[config.activation]
        self.few_token_kernels = False  # as the block's

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fc, proj = (product_by(part, self.few_token_kernels) for part in (self.fc, self.proj))
        gate, up = fc(x).chunk(2, dim=-1)
        return proj(self.act(gate) * up)


class Block(GradientCheckpointingLayer):
    """A mixer of tokens (attention or a recurrence) and an mlp on the residual stream, with the family's norms.

    `norm_1` and `norm_2` are the mixer's, `norm_3` and `norm_4` the mlp's; with two norms a block (`pre`, `post`)
    `norm_1` is the mixer's and `norm_2` the mlp's.
    """

    def __init__(self, config: RecurrentDepthConfig, layer: int) -> None:
        super().__init__()
        self.placement = config.norm_placement
        self.layer_idx = layer
        self.few_token_kernels = False  # see `RecurrentStack.use_few_token_kernels`
        # The tensors' names also show which of the two a layer has.
        if config.layer_type(layer) == LRU_LAYER:
            self.recurrence = LruMixer(config, layer)
        else:
            self.attn = Attention(config, layer)
        self.mlp = GatedMLP(config)
        # How a fresh model initialises this layer: transformers passes a module alone, without its position.
        self.mlp.proj.fresh_start = "narrow"  # type: ignore[assignment]
        self.mlp.fc.fresh_start = "up half narrow"  # type: ignore[assignment]
        self.norm_1 = norm(config, config.n_embd)
        self.norm_2 = norm(config, config.n_embd)
        if self.placement in ("sandwich", "huginn"):
            self.norm_3 = norm(config, config.n_embd)
            self.norm_4 = norm(config, config.n_embd)

    def forward(self, x: torch.Tensor, context: PassContext, step: int = 0) -> torch.Tensor:
        """`x` is `[B, T, D]`; `step` counts from 1 in the core and is 0 elsewhere. Returns `[B, T, D]`."""
        context = context.to(x.device)
        if self.few_token_kernels:
            reached = run_block(self, x, context, step)
            if reached is not None:
                return reached
        if self.placement == "pre":
            x = x + self._mix(self.norm_1(x), context, step)
            x = x + self._mlp(self.norm_2(x), context, step)
        elif self.placement == "post":
            x = x + self.norm_1(self._mix(x, context, step))
            x = x + self.norm_2(self._mlp(x, context, step))
        elif self.placement == "sandwich":
            x = x + self.norm_2(self._mix(self.norm_1(x), context, step))
            x = x + self.norm_4(self._mlp(self.norm_3(x), context, step))
        else:
            x = self.norm_2(x + self._mix(self.norm_1(x), context, step))
            x = self.norm_4(x + self._mlp(self.norm_3(x), context, step))
        return context.watched("layer", self.layer_idx, step, x)

    def _mix(self, x: torch.Tensor, context: PassContext, step: int) -> torch.Tensor:
        mixer = self.recurrence if hasattr(self, "recurrence") else self.attn
        return context.watched("attention", self.layer_idx, step, mixer(x, context, step))

    def _mlp(self, x: torch.Tensor, context: PassContext, step: int) -> torch.Tensor:
        return context.watched("mlp", self.layer_idx, step, self.mlp(x))
