"""RecurrentGemma (Griffin, De et al. 2024): gated linear recurrences and windowed attention, in transformers' format.

Config fields, tensor names, arguments and outputs are those of transformers' class, so that hub checkpoints load as
they are. Every state that outlives a call is in the cache, the recurrence is a scan, and padding is kept out of both.

Shapes: B batch, T new tokens, S stored tokens, D width, R width of the recurrence, H heads, G key/value heads,
K head_dim, W width of a recurrent head (R / H), C taps of the convolution.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from redepth.modeling.elementwise import RMSNorm
from redepth.modeling.errors import UserError
from redepth.modeling.lru_mixer import RGLRU
from redepth.modeling.tokens import align_right

from .cache import RecurrentGemmaCache, cache_signature
from .capped_loss import SoftCap, capped_loss
from .configuration import RecurrentGemmaConfig, check_config
from .layers import RecurrentGemmaLayer
from .passes import prepare

# What the Trainer and generate() pass along besides the named arguments.
TAKEN_ARGUMENTS = {"num_items_in_batch", "tokenizer", "assistant_tokenizer"}


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
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, one_plus=True)
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
                document, to which nothing of the previous one is visible.
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

        x, shared = prepare(self.config, x, attention_mask, position_ids, cache, bool(output_attentions))
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
            cache.commit(x.shape[0], x.shape[1], shared.timeline, shared.document_tokens)
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
        """Leave positions to the model: generate() would continue counting from the last column, which may be padding."""

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
