"""The depth-recurrent language model: prelude, looped core, coda.

    e   = prelude(embed(x) * embed_scale)
    s_0 = initial state
    s_i = core(adapter([s_{i-1}; e]))         i = 1 … num_steps
    y   = lm_head(norm(coda(s_r)))            Huginn also norms s_r before the coda

(Geiping et al. 2025, section 3.1; McLeish et al. 2025, section 3.) Shapes: B batch, T new tokens, D width, V vocabulary.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, logging

from .blocks import Attention, Block, PassContext, RMSNorm, rotations
from .cache import RecurrentDepthCache, SomeTokens, parse_cache_rule
from .configuration import RECURRENCE, RecurrentDepthConfig
from .decoding import cache_rule_for, choose_decoding, exit_policy
from .depth import sample_num_steps, split_num_steps
from .errors import UserError
from .exits import ExitPolicy, ExitTest, Measure
from .loss import TokenLoss, chunked_cross_entropy, cross_entropy_of_tokens
from .lru_mixer import GATE_VARIANCE, RGLRU
from .lru_slots import read_columns
from .published import complete_config
from .state import fresh_noise, position_noise

logger = logging.get_logger(__name__)

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
# What the Trainer and generate() pass along besides the named arguments.
TAKEN_ARGUMENTS = {"num_items_in_batch", "output_attentions", "tokenizer", "assistant_tokenizer"}
MASK_MAKERS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}


@dataclass
class RecurrentDepthOutput(ModelOutput):
    """
    Args:
        loss: mean next-token cross-entropy in nats, where labels were given.
        logits: `[B, T, V]`, or fewer tokens with `logits_to_keep`.
        log_ppl: the loss without its graph.
        past_key_values: the cache, where one is used.
        latent_states: s_r, `[B, T, D]`, as it enters the coda.
        hidden_states: with `output_hidden_states`, the residual stream `[B, T, D]` after the embedding, then after
            each layer of the prelude, each layer of each step of the core, and each layer of the coda.
        stats: `num_steps`, the number of steps run; with a criterion `[B, T]`, each token's, and `core_passes`, how many
            tokens went through the core in all.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    log_ppl: torch.Tensor | None = None
    past_key_values: RecurrentDepthCache | None = None
    latent_states: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    stats: dict[str, Any] | None = None


def _gather_context(context: PassContext, some: SomeTokens) -> PassContext:
    """The context of some tokens of a pass; masks must be written out, `[B or 1, 1, T, S + T]`."""
    return replace(
        context,
        masks={kind: some.gather(mask[:, 0])[:, None] for kind, mask in context.masks.items()},
        rotations={kind: (some.gather(cos), some.gather(sin)) for kind, (cos, sin) in context.rotations.items()},
        some=some,
    )


def _hide(mask: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """A mask `[B or 1, 1, T, S]`, bool or additive, without the keys that `visible` `[B, S]` leaves out."""
    seen = visible[:, None, None]
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


class RecurrentDepthForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model whose core is looped `num_steps` times.

    `generate` is transformers' own: `num_steps`, `criterion` and its settings, `state_seed` and `cache_rule` pass through
    it to every forward call.
    """

    config_class = RecurrentDepthConfig
    config: RecurrentDepthConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
    _keys_to_ignore_on_load_unexpected = [r"freqs_cis"]

    def __init__(self, config: RecurrentDepthConfig) -> None:
        if config.attn_logit_softcapping is not None:
            self._supports_sdpa = False
        super().__init__(config)
        first_core = config.n_layers_in_prelude
        first_coda = first_core + config.n_layers_in_recurrent_block
        assert config.n_layers is not None
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "prelude": nn.ModuleList(Block(config, layer) for layer in range(first_core)),
                "adapter": nn.Linear(2 * config.n_embd, config.n_embd, bias=False),
                "core_block": nn.ModuleList(Block(config, layer) for layer in range(first_core, first_coda)),
                "coda": nn.ModuleList(Block(config, layer) for layer in range(first_coda, config.n_layers)),
                "ln_f": RMSNorm(config.n_embd, config),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # Training: keep only the states between steps, and run each step again in the backward pass.
        self.checkpoint_steps = False
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """As in transformers; a published config that leaves its kind open is completed from the tensor names.

        Raises:
            ValueError: for a checkpoint that fits no published kind, naming the tensors.
        """
        where = {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None}
        if not isinstance(config, PreTrainedConfig):
            config = cls.config_class.from_pretrained(config or pretrained_model_name_or_path, **where)
            for key in set(kwargs) & set(config.to_dict()) - {"dtype"}:
                setattr(config, key, kwargs.pop(key))
        if pretrained_model_name_or_path is not None:
            complete_config(config, pretrained_model_name_or_path, **where)
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The published start: normal cut at ±3 std, output projections and the mlp's up half narrower by depth."""
        assert self.config.init_values is not None
        std, narrow = self.config.init_values["std"], self.config.init_values["out_proj"]

        def cut_normal(weight: torch.Tensor, deviation: float) -> None:
            init.trunc_normal_(weight, std=deviation, a=-3 * deviation, b=3 * deviation)

        if isinstance(module, nn.Embedding):
            cut_normal(module.weight, self.config.init_values["embedding"])
        elif isinstance(module, RMSNorm):
            init.zeros_(module.weight) if module.one_plus else init.ones_(module.weight)
        elif isinstance(module, nn.Linear):
            start = getattr(module, "fresh_start", "plain")
            cut_normal(module.weight, narrow if start == "narrow" else std)
            if start == "up half narrow" and not getattr(module.weight, "_is_hf_initialized", False):
                cut_normal(module.weight.chunk(2)[1], narrow)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, Attention) and self.config.qk_bias:
            init.zeros_(module.qk_bias)
        elif isinstance(module, RGLRU):
            module.fresh_start(GATE_VARIANCE)
        elif isinstance(module, nn.Conv1d):
            cut_normal(module.weight, (GATE_VARIANCE / self.config.conv1d_width) ** 0.5)
            assert module.bias is not None
            init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer["wte"]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer["wte"] = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Give generate() the one cache that knows about steps."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise UserError(
                f"cache_implementation={generation_config.cache_implementation!r} is not supported by a depth-recurrent "
                "model; leave it out and choose a cache_rule instead"
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            rule = cache_rule_for(self.config, model_kwargs.get("cache_rule"), model_kwargs.get("criterion"))
            model_kwargs["past_key_values"] = RecurrentDepthCache(self.config, rule)
            if generation_config.is_assistant:
                model_kwargs["past_key_values"].activate_past_recording()

    def _context(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: RecurrentDepthCache | None,
        whole_masks: bool = False,
    ) -> PassContext:
        """Masks, rotary angles and positions of one pass over `hidden` `[B, T, D]`.

        Args:
            whole_masks: write masks out even where all is causal, so that tokens can be gathered from them.

        Raises:
            ValueError: for a mask that does not cover stored and new tokens, or more tokens than the model allows.
            TypeError: for a cache of another model.
        """
        if cache is not None and not isinstance(cache, RecurrentDepthCache):
            raise TypeError(
                f"past_key_values is a {type(cache).__name__}, but a depth-recurrent model needs a RecurrentDepthCache; "
                "leave it out to get one"
            )
        if cache is not None and (cache.recurrent is not None) != self.config.has_recurrence:
            raise UserError("past_key_values was made for a model with other layers; leave it out to get a fitting one")
        batch, tokens, _ = hidden.shape
        past = cache.get_seq_length() if cache is not None else 0
        total = past + tokens
        self.check_length(total)
        if attention_mask is not None and attention_mask.ndim == 2:
            if attention_mask.shape != (batch, total):
                raise UserError(
                    f"attention_mask has shape {list(attention_mask.shape)}, but {past} stored and {tokens} new tokens "
                    f"in {batch} rows need [{batch}, {total}]"
                )
        elif attention_mask is not None and (attention_mask.ndim != 4 or self.config.layer_types is not None):
            raise UserError(
                f"attention_mask has shape {list(attention_mask.shape)}; give [batch, tokens], or [batch, 1, new, all] "
                "to a model without sliding windows"
            )
        if cache is not None and (attention_mask is None or attention_mask.ndim == 2):
            attention_mask = cache.extend_padding_mask(attention_mask, tokens)

        given_positions = position_ids
        if position_ids is None:
            if attention_mask is not None and attention_mask.ndim == 2:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
            else:
                position_ids = torch.arange(past, total, device=hidden.device)[None]
        attention_types = sorted(set(self.config.layer_types or ["full_attention"]) - {RECURRENCE})
        columns = None
        if self.config.has_recurrence:
            columns = read_columns(
                batch,
                tokens,
                past,
                self.config.conv1d_width,
                attention_mask,
                given_positions,
                cached=cache is not None,
                device=hidden.device,
            )
        mask_inputs: dict[str, Any] = {
            "config": self.config,
            "inputs_embeds": hidden,
            "attention_mask": attention_mask,
            "past_key_values": cache,
            # Only positions that the caller gave may mark packed documents.
            "position_ids": given_positions,
            "allow_is_causal_skip": not whole_masks,
        }
        return PassContext(
            masks={kind: MASK_MAKERS[kind](**mask_inputs) for kind in attention_types},
            rotations={kind: rotations(self.config, position_ids, kind) for kind in attention_types},
            cache=cache,
            position_ids=position_ids,
            columns=columns,
        )

    def check_length(self, tokens: int) -> None:
        """Raises ValueError where a row has more tokens than the model allows."""
        if tokens > self.config.block_size:
            raise UserError(
                f"{tokens} tokens are more than the {self.config.block_size} this model allows; shorten the prompt or "
                "generate fewer tokens"
            )

    def _embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Token embeddings times `embed_scale`, `[B, T, D]`; `inputs_embeds` are taken before the scale."""
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give either input_ids or inputs_embeds, and not both")
        embedded = self.transformer["wte"](input_ids) if inputs_embeds is None else inputs_embeds
        return embedded * self.config.embed_scale if self.config.embed_scale != 1 else embedded

    def _run(
        self,
        layers: nn.Module,
        x: torch.Tensor,
        context: PassContext,
        step: int = 0,
        record: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        for layer in layers:  # type: ignore[attr-defined]
            x = layer(x, context, step)
            if record is not None:
                record.append(x)
        return x

    def _step(
        self,
        embedded: torch.Tensor,
        state: torch.Tensor,
        context: PassContext,
        step: int,
        record: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        if context.cache is not None and context.cache.rule.missing == "skip":
            context = self._without_skipped(context, step, state)
        injected = self.transformer["adapter"](torch.cat([state, embedded], dim=-1))
        return self._run(self.transformer["core_block"], injected, context, step, record)

    def _without_skipped(self, context: PassContext, step: int, state: torch.Tensor) -> PassContext:
        """Under cache rule `skip`, hide the tokens that never came to this step."""
        assert context.cache is not None
        steps_run = context.steps_run
        if steps_run is None:
            steps_run = torch.full(state.shape[:2], step, device=state.device)
        visible = context.cache.visible(step, steps_run)
        if visible is None:
            return context
        if context.some is not None:
            visible = visible[context.some.rows]
        return replace(context, masks={kind: _hide(mask, visible) for kind, mask in context.masks.items()})

    def _initial_state(self, embedded: torch.Tensor, positions: torch.Tensor, seed: int | None) -> torch.Tensor:
        config = self.config
        if config.initial_state_mode == "embed":
            return embedded
        if config.initial_state_mode == "zeros":
            return torch.zeros_like(embedded)
        assert config.init_values is not None
        std = config.state_std if config.state_std is not None else config.init_values["std"]
        scale = config.state_scale if config.state_scale is not None else config.embed_scale
        if self.training and seed is None:
            noise = fresh_noise(embedded)
        else:
            chosen = seed if seed is not None else config.state_seed
            noise = position_noise(chosen, positions, config.n_embd).expand_as(embedded)
        return (noise * (std * scale)).to(embedded.dtype)

    def _loop_until_settled(
        self,
        embedded: torch.Tensor,
        state: torch.Tensor,
        context: PassContext,
        policy: ExitPolicy,
        num_steps: int,
        real: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Adaptive exit: every token leaves the loop when its test says so, and costs the core nothing from then on.

        What an exited token shows at its deeper steps is the cache rule's to say.

        Args:
            real: `[B, T]`, which tokens are not padding; padding leaves after the first step.

        Returns:
            the states `[B, T, D]`, the steps each token ran `[B, T]`, and the core's passes in tokens.
        """
        active = torch.ones(embedded.shape[:2], dtype=torch.bool, device=embedded.device)
        steps_run = torch.zeros_like(active, dtype=torch.long)
        core_passes = 0
        for step in range(1, num_steps + 1):
            some = SomeTokens.of(active)
            core_passes += some.positions.numel()
            steps_run = steps_run + active
            whole = bool(active.all())
            running = replace(context if whole else _gather_context(context, some), steps_run=steps_run)
            if whole:
                moved = state = self._step(embedded, state, running, step)
            else:
                moved = self._step(some.gather(embedded), some.gather(state), running, step)
                state = state.clone()
                state[active] = moved[some.real]
            if step == num_steps:
                break
            looked_at = self._logits(self._coda(moved, running)[1]) if policy.test.of_logits else moved
            settled = policy.settled(looked_at[some.real], active.flatten().nonzero()[:, 0], step)
            active = active.masked_scatter(active, ~settled)
            if real is not None:
                active = active & real
            if not bool(active.any()):
                break
        return state, steps_run, core_passes

    def _coda(
        self, state: torch.Tensor, context: PassContext, record: list[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """s_r in; (latent states, normed output), each `[B, T, D]`, out."""
        if self.config.norm_before_coda:
            state = self.transformer["ln_f"](state)
        x = self._run(self.transformer["coda"], state, context, record=record)
        return state, self.transformer["ln_f"](x)

    def _leave(
        self,
        state: torch.Tensor,
        context: PassContext,
        record: list[torch.Tensor] | None = None,
        steps_run: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The coda, which ends the pass: what is cached now belongs to the past."""
        latent_states, hidden = self._coda(state, context, record)
        if context.cache is not None:
            context.cache.commit(latent_states, steps_run)
        return latent_states, hidden

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.lm_head(hidden)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def embed_inputs(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: RecurrentDepthCache | None = None,
    ) -> tuple[torch.Tensor, int]:
        """First of the step calls: embedding and prelude.

        Returns:
            e `[B, T, D]`, and the number of layers run so far.
        """
        x = self._embed(input_ids, None)
        context = self._context(x, attention_mask, position_ids, past_key_values)
        return self._run(self.transformer["prelude"], x, context), self.config.n_layers_in_prelude

    def initialize_state(
        self, input_embeds: torch.Tensor, position_ids: torch.Tensor | None = None, state_seed: int | None = None
    ) -> torch.Tensor:
        """s_0 for e `[B, T, D]`, of the same shape and dtype; positions count from 0 if not given."""
        if position_ids is None:
            position_ids = torch.arange(input_embeds.shape[1], device=input_embeds.device)[None]
        return self._initial_state(input_embeds, position_ids, state_seed)

    def iterate_one_step(
        self,
        input_embeds: torch.Tensor,
        input_states: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: RecurrentDepthCache | None = None,
        block_idx: int = 0,
        current_step: int = 0,
    ) -> tuple[torch.Tensor, int, int]:
        """One pass through the core.

        Args:
            input_embeds, input_states: e and s, `[B, T, D]`.
            block_idx: layers run so far.
            current_step: steps run so far.

        Returns:
            the next state `[B, T, D]`, and the two counts brought up to date.
        """
        context = self._context(input_embeds, attention_mask, position_ids, past_key_values)
        state = self._step(input_embeds, input_states, context, current_step + 1)
        return state, block_idx + self.config.n_layers_in_recurrent_block, current_step + 1

    def predict_from_latents(
        self,
        latents: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: RecurrentDepthCache | None = None,
    ) -> RecurrentDepthOutput:
        """Last of the step calls: coda and head on a state `[B, T, D]`. With a cache, ends the pass."""
        context = self._context(latents, attention_mask, position_ids, past_key_values)
        latent_states, hidden = self._leave(latents, context)
        return RecurrentDepthOutput(
            logits=self._logits(hidden), past_key_values=past_key_values, latent_states=latent_states
        )

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: RecurrentDepthCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        input_states: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_steps: int | tuple[int, int] | torch.Tensor | None = None,
        criterion: str | ExitTest | Measure | None = None,
        exit_threshold: float | str = "auto",
        min_steps: int = 1,
        continuous_compute: bool = False,
        state_seed: int | None = None,
        cache_rule: str | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        loss_only: bool = False,
        token_loss: TokenLoss = cross_entropy_of_tokens,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> RecurrentDepthOutput | tuple[Any, ...]:
        """
        Args:
            input_ids: `[B, T]`; or `inputs_embeds` `[B, T, D]`.
            attention_mask: `[B, stored + T]`, 1 for tokens and 0 for padding, on either side.
            input_states: s_0 `[B, T, D]`, in place of the config's initial state.
            labels: `[B, T]`, shifted inside; -100 is left out of the loss.
            num_steps: an int, or a pair (steps without gradient, steps with gradient). The config's
                `default_num_steps` by default; in training mode the default is drawn anew at each call.
            criterion: exit test of adaptive depth: `kl`, `entropy-diff`, `latent-diff`, `cosine`, `argmax-stability`,
                or a callable on (new, old) states. Each token leaves when it passes, at the latest after num_steps.
            exit_threshold: the test's, `auto` for its default, or a calibrated agreement such as `99%`.
            min_steps: steps that every token runs under a criterion.
            continuous_compute: a single new token starts from the s_r of the one before it, which the cache holds, instead
                of the initial state (warm start, "continuous chain of thought"). Prompts start as ever.
            state_seed: seed of a noise state; the config's by default. In training mode the default is fresh noise.
            cache_rule: rule of a cache made by this call; see `RecurrentDepthCache`.
            logits_to_keep: how many last tokens get logits, 0 for all, or their indices.
            loss_only: with labels, compute the loss a few tokens at a time and return no logits.
            token_loss: the loss of some tokens under `loss_only`; the cross-entropy by default.

        Raises:
            ValueError: for num_steps < 1, a mask that can't be honoured, or more tokens than `block_size`.
            TypeError: for an unknown argument or a cache of another model.
        """
        unknown = set(kwargs) - TAKEN_ARGUMENTS
        if unknown:
            raise TypeError(f"forward() got an unknown argument {min(unknown)!r}; see its documentation")
        if kwargs.get("output_attentions"):
            raise UserError("output_attentions is not supported; a core layer has one attention map for each step")

        if num_steps is None and self.training:
            steps_without, steps_with = sample_num_steps(self.config.mean_recurrence, self.config.mean_backprop_depth)
        else:
            steps_without, steps_with = split_num_steps(
                num_steps if num_steps is not None else self.config.default_num_steps
            )
        total_steps = steps_without + steps_with

        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and self.training and self.is_gradient_checkpointing:
            raise UserError("use_cache=True can't go with gradient checkpointing; pass use_cache=False")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        policy = None
        if criterion is not None:
            if output_hidden_states:
                raise UserError(
                    "output_hidden_states can't go with a criterion; tokens run different numbers of layers"
                )
            policy = exit_policy(self.config, criterion, exit_threshold, min_steps, total_steps)
            if steps_without or (torch.is_grad_enabled() and self.training):
                raise UserError("a criterion is for inference; call model.eval() and give num_steps as one number")
        given_rule = past_key_values.rule.name if isinstance(past_key_values, RecurrentDepthCache) else cache_rule
        rule = cache_rule_for(self.config, given_rule, criterion)
        cache = past_key_values
        if cache is None and (use_cache or policy is not None):
            cache = RecurrentDepthCache(self.config, rule)

        if continuous_compute and cache is None:
            raise UserError("continuous_compute=True needs a cache to carry the state; leave use_cache on")
        past_states = cache.last_state if isinstance(cache, RecurrentDepthCache) else None
        if continuous_compute and past_states is None and cache is not None and cache.get_seq_length():
            raise UserError("continuous_compute=True can't go on from a cropped cache, whose last state is gone")

        x = self._embed(input_ids, inputs_embeds)
        whole_masks = policy is not None or parse_cache_rule(rule).missing == "skip"
        context = self._context(x, attention_mask, position_ids, cache, whole_masks)
        if cache is not None:
            cache.check_steps(total_steps)
        record = [x] if output_hidden_states else None
        embedded = self._run(self.transformer["prelude"], x, context, record=record)
        state = input_states
        if state is None and continuous_compute and past_states is not None and embedded.shape[1] == 1:
            state = past_states
        elif state is None:
            state = self._initial_state(embedded, context.position_ids, state_seed)
        stats: dict[str, Any] = {"num_steps": total_steps}
        steps_run = None
        if policy is not None:
            assert cache is not None
            mask = cache.padding_mask
            real = mask[:, -x.shape[1] :].bool() if mask is not None else None
            state, steps_run, core_passes = self._loop_until_settled(
                embedded, state, context, policy, total_steps, real
            )
            stats = {"num_steps": steps_run, "core_passes": core_passes}
        else:
            for step in range(1, total_steps + 1):
                with torch.no_grad() if step <= steps_without else nullcontext():
                    if self.checkpoint_steps and torch.is_grad_enabled() and cache is None and record is None:
                        state = checkpoint(self._step, embedded, state, context, step, use_reentrant=False)
                    else:
                        state = self._step(embedded, state, context, step, record)
        latent_states, hidden = self._leave(state, context, record, steps_run)

        logits = loss = None
        if loss_only and labels is not None:
            items = kwargs.get("num_items_in_batch")
            learned = self.lm_head.parameters()
            loss = chunked_cross_entropy(
                hidden, labels, self._logits, self.config.vocab_size, items, token_loss, parameters=learned
            )
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self._logits(hidden[:, kept])
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = RecurrentDepthOutput(
            loss=loss,
            logits=logits,
            log_ppl=loss.detach() if loss is not None else None,
            past_key_values=cache if use_cache or past_key_values is not None else None,
            latent_states=latent_states,
            hidden_states=tuple(record) if record is not None else None,
            stats=stats,
        )
        return output if return_dict is not False else output.to_tuple()

    def generate(  # type: ignore[override]
        self,
        inputs: torch.Tensor | None = None,
        generation_config: Any = None,
        *,
        streamer: Any = None,
        assistant_model: Any = None,
        custom_generate: Any = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`; what `forward` takes passes through it, and there are two more ways of decoding.

        Args:
            num_steps: the config's `default_num_steps` by default.
            draft_steps: draft tokens with so few steps and verify them with `num_steps` in one pass (self-speculative
                decoding): the same output, or the same distribution, sooner; see `speculation.speculative_decoding`.
            draft_tokens: how many are drafted at a time; adapted to what is accepted by default.
            sampler: `wavefront`: all unsettled tokens advance together, a few steps each; not lossless. Its settings are
                those of `wavefront.check_wavefront`.

        Returns:
            as `generate`; with `return_dict_in_generate=True` the output has `stats`, of which `num_steps` `[B, tokens]` is
            the steps of each token in the cache.

        Raises:
            ValueError: for policies that exclude each other, before any compute, and as `forward`.
        """
        arguments = kwargs | {"custom_generate": custom_generate, "assistant_model": assistant_model}
        decode = choose_decoding(self.config, arguments)
        self._warn_outside_calibration(arguments.get("num_steps"))
        if decode is not None:
            # transformers hands no streamer to a decoding method of one's own.
            arguments["custom_generate"] = partial(decode, streamer=streamer)
        transformers_generate: Any = super().generate  # type: ignore[misc]
        output = transformers_generate(inputs, generation_config, streamer=streamer, **arguments)
        if decode is None and isinstance(output, ModelOutput) and output.get("past_key_values") is not None:
            output["stats"] = {"num_steps": output["past_key_values"].steps_run}
        return output

    def _warn_outside_calibration(self, num_steps: Any) -> None:
        if num_steps is None or self.config.depth_profile is None:
            return
        steps, (least, most) = sum(split_num_steps(num_steps)), self.config.depth_profile["valid_range"]
        if not least <= steps <= most:
            logger.warning_once(
                f"num_steps={steps} is outside {least} to {most}, where calibration found this checkpoint sound; expect worse "
                "text, or calibrate deeper"
            )

    def generate_with_adaptive_compute(
        self,
        input_ids: torch.Tensor,
        generation_config: Any = None,
        tokenizer: Any = None,
        streamer: Any = None,
        continuous_compute: bool = False,
        criterion: str | ExitTest | Measure | None = "entropy-diff",
        exit_threshold: float | str = "auto",
        cache_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """`generate` with a criterion, under the name and arguments of Huginn's published code.

        Args:
            cache_kwargs: `lookup_strategy`, a cache rule by its published name.
            continuous_compute: start each token from the state of the one before.

        Raises:
            ValueError: for an argument that is not supported, and as `generate`.
        """
        known = {"lookup_strategy"}
        unknown = set(cache_kwargs or {}) - known
        if unknown:
            raise UserError(f"cache_kwargs has {min(unknown)!r}, but only {', '.join(known)} is known")
        rule = (cache_kwargs or {}).get("lookup_strategy")
        # Without a criterion a call is a plain generate; with one, `latest` is what the published rule comes down to.
        if criterion in (None, "none"):
            kwargs |= {"cache_rule": rule}
        else:
            kwargs |= {
                "criterion": criterion,
                "exit_threshold": exit_threshold,
                "cache_rule": None if rule == "full" else rule,
            }
        return self.generate(
            input_ids,
            generation_config,
            tokenizer=tokenizer,
            streamer=streamer,
            continuous_compute=continuous_compute,
            **kwargs,
        )


# transformers then copies these modules into every folder it saves, so that the folder loads without redepth.
RecurrentDepthConfig.register_for_auto_class()
RecurrentDepthForCausalLM.register_for_auto_class("AutoModelForCausalLM")
