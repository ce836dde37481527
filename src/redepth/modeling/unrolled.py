"""A depth-recurrent model at one depth, presented as an ordinary deep one.

Prelude, core, core, …, coda, each a layer with an index of its own, over shared weights. To whoever keeps the keys and
values it is a model of prelude + r · core + coda layers: transformers' continuous batching (`generate_batch`), and engines
that run transformers' models with their own attention. Shapes: B batch, T new tokens, D width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from .attention import eager_attention
from .blocks import Attention
from .configuration import RecurrentDepthConfig
from .errors import UserError
from .passes import MASK_MAKERS, PassContext, check_length
from .rotary import rotations
from .stack import RecurrentStack

# Of these, transformers' versions can't cap the scores.
WITHOUT_SOFT_CAP = ("sdpa", "paged|eager")


class UnrolledConfig(PreTrainedConfig):
    """
    Args:
        recurrent (`dict`): the recurrent model's configuration.
        num_steps (`int`): the depth.
    """

    model_type = "huginn_raven_unrolled"

    recurrent: dict[str, Any] | None = None
    num_steps: int = 1
    vocab_size: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int | None = None
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        own = self.recurrent_config()
        before, core = own.n_layers_in_prelude, own.n_layers_in_recurrent_block
        assert own.n_layers is not None
        kinds = [own.layer_type(layer) for layer in range(own.n_layers)]
        looped = kinds[before : before + core]
        self.layer_types = [*kinds[:before], *looped * self.num_steps, *kinds[before + core :]]
        self.num_hidden_layers = len(self.layer_types)
        self.sliding_window = own.sliding_window if "sliding_attention" in self.layer_types else None
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
            setattr(self, name, getattr(own, name))
        for name in ("head_dim", "max_position_embeddings", "tie_word_embeddings"):
            setattr(self, name, getattr(own, name))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(self, name, getattr(own, name))
        super().__post_init__(**kwargs)

    def recurrent_config(self) -> RecurrentDepthConfig:
        """The recurrent model's configuration."""
        return RecurrentDepthConfig(**self.recurrent or {})


@dataclass
class LayerAt:
    """What an attention implementation asks of a layer, with the layer's index in the unrolled model."""

    layer_idx: int
    num_key_value_groups: int
    scaling: float
    sliding_window: int | None
    config: PreTrainedConfig
    is_causal: bool = True
    training: bool = False


class UnrolledAttention:
    """Attention of one pass, by the implementation and the cache of whoever runs the unrolled model.

    Attributes:
        offset: from a layer's own index to the unrolled one; it grows with the steps.
    """

    def __init__(self, config: UnrolledConfig, masks: Any, cache: Any, arguments: dict[str, Any]) -> None:
        self.config, self.masks, self.cache, self.arguments = config, masks, cache, arguments
        self.offset = 0
        self.implementation = str(config._attn_implementation)
        self.attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.implementation, eager_attention)

    def __call__(self, module: Attention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """q `[B, H, T, K]`, k and v `[B, G, T, K]` → `[B, T, H, K]`."""
        if module.soft_cap is not None and self.implementation in WITHOUT_SOFT_CAP:
            raise UserError(
                f"attention of kind {self.implementation!r} can't soft-cap its scores as this model needs it; serve it with "
                "redepth's engine"
            )
        cap = {} if module.soft_cap is None else {"softcap": module.soft_cap}
        layer = module.layer_idx + self.offset
        if self.cache is not None:
            key, value = self.cache.update(key, value, layer)
        mixed, _ = self.attend(
            LayerAt(layer, module.num_key_value_groups, module.scaling, module.sliding_window, self.config),
            query,
            key,
            value,
            self.masks[module.layer_type] if isinstance(self.masks, dict) else self.masks,
            scaling=module.scaling,
            dropout=0.0,
            sliding_window=module.sliding_window,
            **cap,
            **self.arguments,
        )
        return mixed.unflatten(-1, (-1, module.head_dim)) if mixed.ndim == 3 else mixed


class UnrolledPreTrainedModel(PreTrainedModel):
    config_class = UnrolledConfig
    config: UnrolledConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    _supports_attention_backend = True


class UnrolledModel(UnrolledPreTrainedModel):
    """Everything but the head, over the recurrent model's `stack`."""

    def __init__(self, config: UnrolledConfig, stack: RecurrentStack | None = None) -> None:
        super().__init__(config)
        self.stack = RecurrentStack(config.recurrent_config()) if stack is None else stack
        if stack is None:
            self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.stack.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.stack.wte = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **arguments: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """
        Args:
            input_ids: `[B, T]`, or `inputs_embeds` `[B, T, D]`, taken before the embedding's scale.
            attention_mask: `[B, S]`; or as the attention takes it, by kind of layer where there are several.
            position_ids: `[B, T]`; counted on from what is stored by default.
            past_key_values: a cache of transformers'.
            arguments: handed down to the attention, such as another engine's cache.

        Raises:
            ValueError: for more tokens than the model allows, and an attention that can't do what the model needs.
        """
        stack, config = self.stack, self.config
        x = stack.embed(input_ids, inputs_embeds)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
        check_length(stack.config, int(position_ids.max()) + 1)
        masks = attention_mask
        kinds = set(config.layer_types or ())
        if not arguments.get("cache") and (attention_mask is None or getattr(attention_mask, "ndim", 4) == 2):
            masks = {
                kind: MASK_MAKERS[kind](
                    config=config,
                    inputs_embeds=x,
                    attention_mask=attention_mask,
                    past_key_values=past_key_values,
                    position_ids=position_ids,
                )
                for kind in kinds
            }
        attend = UnrolledAttention(config, masks, past_key_values, arguments)
        context = PassContext(
            masks={},
            rotations={kind: rotations(stack.config, position_ids, kind) for kind in kinds},
            cache=None,
            position_ids=position_ids,
            attention=attend.implementation,
            attend=attend,
        )
        embedded = stack.run_prelude(x, context)
        state = stack.initial_state(embedded, position_ids, None)
        for step in range(1, config.num_steps + 1):
            attend.offset = (step - 1) * len(stack.core_block)
            state = stack.step(embedded, state, context, step)
        _, hidden = stack.run_coda(state, context)
        output = BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)
        return output if return_dict is not False else output.to_tuple()


class UnrolledForCausalLM(UnrolledPreTrainedModel, GenerationMixin):
    """The unrolled model with its head; made by `RecurrentDepthForCausalLM.unrolled`, whose weights it shares."""

    _tied_weights_keys = {"lm_head.weight": "transformer.stack.wte.weight"}

    def __init__(
        self, config: UnrolledConfig, stack: RecurrentStack | None = None, head: nn.Module | None = None
    ) -> None:
        super().__init__(config)
        self.transformer = UnrolledModel(config, stack)
        width, vocabulary = self.transformer.stack.config.n_embd, self.transformer.stack.config.vocab_size
        self.lm_head = nn.Linear(width, vocabulary, bias=False) if head is None else head
        if stack is None:
            self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, *inputs: Any, logits_to_keep: int | torch.Tensor = 0, **keywords: Any) -> CausalLMOutputWithPast:
        """As `UnrolledModel.forward`; `logits_to_keep`: how many last tokens get logits, 0 for all, or their indices."""
        outputs = self.transformer(*inputs, **keywords | {"return_dict": True})
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, cap = (
            self.lm_head(outputs.last_hidden_state[:, kept]),
            self.transformer.stack.config.final_logit_softcapping,
        )
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        return CausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)


UnrolledConfig.register_for_auto_class()
UnrolledModel.register_for_auto_class("AutoModel")
UnrolledForCausalLM.register_for_auto_class("AutoModelForCausalLM")
