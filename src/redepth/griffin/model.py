"""RecurrentGemma (Griffin, De et al. 2024): gated linear recurrences and windowed attention, in transformers' format.

Config fields, tensor names, arguments and outputs are those of transformers' class, so that hub checkpoints load as
they are. Every state that outlives a call is in the cache, the recurrence is a scan, and padding is kept out of both.

Shapes: B batch, T new tokens, S stored tokens, D width, R width of the recurrence, H heads, G key/value heads,
K head_dim, W width of a recurrent head (R / H), C taps of the convolution.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import RecurrentGemmaConfig as TransformersRecurrentGemmaConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from redepth.modeling.blocks import eager_attention
from redepth.modeling.errors import UserError
from redepth.modeling.lru_mixer import BLOCK, RGLRU, RecurrentBlock, Timeline, fits_no_cache, times
from redepth.modeling.lru_state import align_right

from .cache import RecurrentGemmaCache, RecurrentLayer, WindowLayer, cache_signature
from .capped_loss import SoftCap, capped_loss

# What the Trainer and generate() pass along besides the named arguments.
TAKEN_ARGUMENTS = {"num_items_in_batch", "tokenizer", "assistant_tokenizer"}
BLOCK_TYPES = ("recurrent", "attention")


class RecurrentGemmaConfig(TransformersRecurrentGemmaConfig):
    """transformers' configuration, refused in one line where no model can have it."""

    def __post_init__(self, **kwargs: Any) -> None:
        check_config(self)
        super().__post_init__(**kwargs)


def check_config(config: Any) -> None:
    """Raise ValueError for a configuration, transformers' own included, that no model can have."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    lru_width = config.lru_width or config.hidden_size
    if config.attention_window_size < 1:
        raise UserError(f"attention_window_size is {config.attention_window_size}, but a window holds at least 1 token")
    if config.conv1d_width < 1:
        raise UserError(f"conv1d_width is {config.conv1d_width}, but a convolution has at least 1 tap")
    if heads < 1 or config.hidden_size % heads:
        raise UserError(f"hidden_size ({config.hidden_size}) is not a multiple of num_attention_heads ({heads})")
    if lru_width % heads:
        raise UserError(f"lru_width ({lru_width}) is not a multiple of num_attention_heads ({heads})")
    if heads % kv_heads:
        raise UserError(f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})")
    unknown = sorted(set(config.block_types) - set(BLOCK_TYPES))
    if unknown or not config.block_types:
        raise UserError(f"block_types holds {unknown or 'nothing'}; use {' and '.join(BLOCK_TYPES)}")


def block_type(config: Any, layer: int) -> str:
    """`recurrent` or `attention`: the pattern repeats over the layers."""
    return config.block_types[layer % len(config.block_types)]


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


class RMSNorm(nn.Module):
    """Root-mean-square norm with weight 1 + w, in fp32 up to the cast."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if fits_no_cache(x):
            out = torch.empty_like(x)
            for part, place in zip(x.split(BLOCK, 1), out.split(BLOCK, 1), strict=True):
                place.copy_(self(part))
            return out
        wide = x.float()
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1]
        normed = wide * torch.rsqrt(mean_square + self.eps)
        return times(normed, 1.0 + self.weight.float()).to(x.dtype)


def rotations(config: Any, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the rotary angles, `[B or 1, T, half the rotated channels]`."""
    parameters = config.rope_parameters
    if parameters.get("rope_type", "default") != "default":
        raise UserError(f"rope_type is {parameters['rope_type']!r}, but RecurrentGemma knows only 'default'")
    rotated = int(config.hidden_size // config.num_attention_heads * parameters.get("partial_rotary_factor", 1.0))
    channels = torch.arange(0, rotated, 2, device=position_ids.device, dtype=torch.float32)
    angles = position_ids[..., None].float() * (1.0 / (parameters["rope_theta"] ** (channels / rotated)))
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first channels of `x` `[B, heads, T, K]`, channel i with channel i + half; the others pass."""
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


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
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, shared.cos, shared.sin), rotate(key, shared.cos, shared.sin)
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


class Recurrence(RecurrentBlock):
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
        assert layer is None or isinstance(layer, RecurrentLayer)
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
        self.temporal_pre_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.temporal_block = mixer(config, layer)
        self.channel_pre_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp_block = MLP(config)

    def forward(self, x: torch.Tensor, shared: Pass) -> torch.Tensor:
        """`x` is `[B, T, D]`; returns `[B, T, D]`."""
        x = x + self.temporal_block(self.temporal_pre_norm(x), shared)
        return x + self.mlp_block(self.channel_pre_norm(x))


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
        # Padding sees itself: a row of the softmax with nothing in it is not a number.
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
        # Within the first window causal is enough, and the kernels are fastest at that.
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


class RecurrentGemmaPreTrainedModel(PreTrainedModel):
    """What the model with and without a head have in common: names, and the published start of the weights."""

    config_class = RecurrentGemmaConfig
    config: RecurrentGemmaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RecurrentGemmaLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = False

    def __init__(self, config: Any) -> None:
        check_config(config)
        super().__init__(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights by fan-in, outputs narrower by depth, biases zero, squared decays even in 0.9² … 0.999²."""
        config = self.config
        deviation = (config.w_init_variance_scale / config.conv1d_width) ** 0.5
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            init.normal_(module.weight, mean=0.0, std=getattr(module, "start_std", deviation))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=deviation)
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, RMSNorm):
            init.zeros_(module.weight)
        elif isinstance(module, RGLRU):
            module.fresh_start(config.w_init_variance_scale)


class RecurrentGemmaModel(RecurrentGemmaPreTrainedModel):
    """The stack of layers, without a head."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(RecurrentGemmaLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # The published factor is √D rounded to bfloat16. On the CPU, because loading builds the model on no device.
        self.embed_scale = float(torch.tensor(config.hidden_size**0.5, dtype=torch.bfloat16, device="cpu"))
        self.gradient_checkpointing = False
        self.post_init()

    def _check_cache(self, cache: Any, batch: int) -> None:
        if not isinstance(cache, RecurrentGemmaCache):
            raise TypeError(
                f"past_key_values is a {type(cache).__name__}, but RecurrentGemma needs a RecurrentGemmaCache; "
                "leave it out to get one"
            )
        if cache.signature != cache_signature(self.config):
            raise UserError("past_key_values was made for a model with other layers; leave it out to get a fitting one")
        if cache.batch is not None and cache.batch != batch:
            raise UserError(f"past_key_values holds {cache.batch} rows, but the input has {batch}")

    def _real_columns(
        self, attention_mask: torch.Tensor | None, cache: RecurrentGemmaCache | None, batch: int, tokens: int
    ) -> torch.Tensor | None:
        """`[B, T]`, which new columns are tokens; None if all are.

        Raises:
            ValueError: for a mask that can't be honoured.
        """
        if attention_mask is None:
            return None
        past = cache.length if cache is not None else 0
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
            raise UserError("attention_mask must be [batch, tokens]; a recurrence can't honour any other kind")
        if attention_mask.shape != (batch, past + tokens):
            raise UserError(
                f"attention_mask has shape {list(attention_mask.shape)}, but {past} stored and {tokens} new tokens in "
                f"{batch} rows need [{batch}, {past + tokens}]"
            )
        mask = attention_mask.bool()
        padded_before = cache is not None and cache.real_tokens is not None
        if not padded_before and bool(mask.all()):
            return None
        if cache is not None and past:
            stored = cache.real_counts(batch, mask.device)
            if not torch.equal(mask[:, :past].sum(1), stored):
                raise UserError("attention_mask differs from the one under which the stored tokens were read")
        real = mask[:, past:]
        return None if bool(real.all()) else real

    def _prepare(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: RecurrentGemmaCache | None,
        whole: bool,
    ) -> tuple[torch.Tensor, Pass]:
        """x `[B, T, D]` with its padding moved to the left, and what the layers share."""
        batch, tokens, _ = x.shape
        device, window = x.device, self.config.attention_window_size
        past = cache.length if cache is not None else 0
        stored = cache.stored if cache is not None else 0
        real = self._real_columns(attention_mask, cache, batch, tokens)
        if position_ids is not None:
            if position_ids.shape not in ((1, tokens), (batch, tokens)):
                raise UserError(f"position_ids has shape {list(position_ids.shape)}, but must be [{batch}, {tokens}]")
            position_ids = position_ids.expand(batch, -1)

        restore = None
        if real is not None:
            counts = real.cumsum(1)
            order = torch.sort(real.to(torch.uint8), dim=1, stable=True).indices
            if not torch.equal(order, torch.arange(tokens, device=device).expand_as(order)):
                # A padding column after tokens reads as the last of them.
                restore = tokens - counts[:, -1:] + counts - 1
                x = align_right(x, order, dim=1)
                real = align_right(real, order, dim=1)
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
            fresh = past == 0 and real is None and bool(starts[:, 0].all()) and not bool(starts[:, 1:].any())
            if bool((starts & (before > 0)).any()):
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
            if fresh or not bool(starts.any()):
                starts = None

        input_order = key_order = first_visible = None
        if padded or several:
            new = real.sum(1) if real is not None else torch.full_like(visible, tokens)
            reachable = visible.clamp(max=stored)
            first_visible = stored + tokens - reachable - new
            if real is not None and past:
                taps = torch.ones(batch, self.config.conv1d_width - 1, dtype=torch.bool, device=device)
                input_order = torch.sort(torch.cat([taps, real], 1).to(torch.uint8), dim=1, stable=True).indices
                held = torch.arange(stored, device=device) >= (stored - reachable)[:, None]
                key_order = torch.sort(torch.cat([held, real], 1).to(torch.uint8), dim=1, stable=True).indices

        explicit = self.config._attn_implementation == "eager"
        segments = attention_segments(tokens, stored, window, device, first_visible, documents, explicit, whole)
        cos, sin = rotations(self.config, position_ids, x.dtype)
        shared = Pass(
            cos=cos,
            sin=sin,
            segments=segments,
            cache=cache,
            timeline=Timeline(fresh, starts, since_start, real, input_order),
            key_order=key_order,
            restore=restore,
            attentions=[] if whole else None,
            document_tokens=document_tokens,
        )
        return x, shared

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: RecurrentGemmaCache | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """
        Args:
            input_ids: `[B, T]`; or `inputs_embeds` `[B, T, D]`, before the embedding scale.
            position_ids: `[B, T]`; counted without padding by default. A 0 after a row's first token starts a new
                document, which nothing of the one before reaches.
            attention_mask: `[B, stored + T]`, 1 for tokens and 0 for padding, anywhere in a row. A padding column after
                a row's tokens returns what the last of them returns.
            past_key_values: the cache of earlier calls; made here if `use_cache`.
            output_hidden_states: return the scaled embeddings, the output of each layer but the last, and the normed
                output of the last.
            output_attentions: return each attention layer's probabilities `[B, H, T, S + T]`; needs eager attention,
                and a mask without padding after tokens.

        Raises:
            ValueError: for a mask or positions that can't be honoured, or a cache of other rows or layers.
            TypeError: for an unknown argument or a cache of another kind.
        """
        unknown = set(kwargs) - TAKEN_ARGUMENTS
        if unknown:
            raise TypeError(f"forward() got an unknown argument {min(unknown)!r}; see its documentation")
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give either input_ids or inputs_embeds, and not both")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x = x * self.embed_scale

        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.gradient_checkpointing and self.training and (use_cache or past_key_values is not None):
            raise UserError("a cache can't go with gradient checkpointing; pass use_cache=False")
        cache = past_key_values
        if cache is not None:
            self._check_cache(cache, x.shape[0])
        elif use_cache:
            cache = RecurrentGemmaCache(self.config)
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_attentions and self.config._attn_implementation != "eager":
            raise UserError("output_attentions needs eager attention; load the model with attn_implementation='eager'")

        x, shared = self._prepare(x, attention_mask, position_ids, cache, bool(output_attentions))
        if output_attentions and shared.restore is not None:
            raise UserError("output_attentions can't be given for padding after tokens; pad on the left")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        record = [x] if output_hidden_states else None
        for layer in self.layers:
            x = layer(x, shared)
            if record is not None:
                record.append(x)
        x = self.final_norm(x)
        if record is not None:
            record[-1] = x
        if cache is not None:
            cache.commit(x.shape[0], x.shape[1], shared.timeline.real, shared.document_tokens)
        output = BaseModelOutputWithPast(
            last_hidden_state=align_right(x, shared.restore, dim=1),
            past_key_values=cache,
            hidden_states=None if record is None else tuple(align_right(h, shared.restore, dim=1) for h in record),
            attentions=None if shared.attentions is None else tuple(shared.attentions),
        )
        return output if return_dict is not False else output.to_tuple()


class RecurrentGemmaForCausalLM(RecurrentGemmaPreTrainedModel, GenerationMixin):
    """The language model: the stack and a head tied to the embedding. `generate` is transformers' own."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = RecurrentGemmaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Give generate() the cache that holds this model's states."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise UserError(
                f"cache_implementation={generation_config.cache_implementation!r} is not supported by RecurrentGemma, "
                "whose memory does not grow; leave it out"
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = RecurrentGemmaCache(self.config)
            if generation_config.is_assistant:
                model_kwargs["past_key_values"].activate_past_recording()

    def _prepare_position_ids_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """Leave positions to the model: generate() would count on from the last column, which may be padding."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values: RecurrentGemmaCache | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """As `RecurrentGemmaModel.forward`, and

        Args:
            labels: `[B, T]`, shifted inside; -100 is left out of the loss. `shift_labels` are taken as they are.
            logits_to_keep: how many last tokens get logits, 0 for all, or their indices.
        """
        outputs = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            past_key_values=past_key_values,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = outputs.last_hidden_state[:, kept]
        cap, loss = self.config.logits_soft_cap, None
        if labels is None and shift_labels is None:
            logits = SoftCap.apply(self.lm_head(hidden), cap)
        else:
            logits, loss = capped_loss(
                self.lm_head(hidden.flatten(0, 1)), labels, cap, shift_labels=shift_labels, **kwargs
            )
            logits = logits.unflatten(0, hidden.shape[:2])
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if return_dict is not False else output.to_tuple()
