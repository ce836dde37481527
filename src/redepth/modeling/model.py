"""The depth-recurrent language model: the stack, a head, and transformers' `generate` around them.

Shapes: B batch, T new tokens, S stored and new tokens, D width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.generation import GenerationMixin
from transformers.utils import ModelOutput, logging

from .cache import RecurrentDepthCache
from .configuration import RecurrentDepthConfig
from .errors import UserError
from .exits import ExitTest, Measure
from .few_tokens import product_by
from .generation import RecurrentDepthGeneration
from .loss import TokenLoss, chunked_cross_entropy, cross_entropy_of_tokens
from .passes import PassContext
from .policy import DepthPolicy, split_num_steps
from .pretrained import RecurrentDepthPreTrainedModel
from .stack import RecurrentStack
from .unrolled import UnrolledConfig, UnrolledForCausalLM

logger = logging.get_logger(__name__)

# What the Trainer and generate() pass along besides the named arguments.
TAKEN_ARGUMENTS = {
    "num_items_in_batch",
    "output_attentions",
    "tokenizer",
    "assistant_tokenizer",
    # Of DataCollatorWithFlattening, which say what its position_ids say.
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "seq_idx",
}
# A checkpoint's copy of this file meets versions of transformers that did not exist when it was written.
IS_EXPORTED = not __name__.startswith("redepth.")


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


class RecurrentDepthForCausalLM(RecurrentDepthPreTrainedModel, RecurrentDepthGeneration, GenerationMixin):
    """A causal language model whose core is looped `num_steps` times.

    `generate` is transformers' own: how deep it goes is resolved once, and passes through it to every forward call.
    """

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: RecurrentDepthConfig) -> None:
        super().__init__(config)
        self.transformer = RecurrentStack(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    @property
    def final_soft_cap(self) -> float | None:
        """The cap of the logits, cap · tanh(x / cap); None where there is none."""
        return self.config.final_logit_softcapping

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head on what the coda left, `[…, D]` → `[…, V]`."""
        cap = self.final_soft_cap
        logits = product_by(self.lm_head, self.transformer.few_token_kernels)(hidden)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def read_logits(self, state: torch.Tensor, context: PassContext) -> torch.Tensor:
        """Coda and head on a state `[B, T, D]` on its way, as if the loop ended here: `[B, T, V]`."""
        return self.logits(self.transformer.run_coda(state, context)[1])

    def compile_core(self) -> bool:
        """See `RecurrentStack.compile_core`."""
        return self.transformer.compile_core()

    def use_few_token_kernels(self, wanted: bool = True) -> bool:
        """See `RecurrentStack.use_few_token_kernels`."""
        return self.transformer.use_few_token_kernels(wanted)

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
        x = self.transformer.embed(input_ids)
        context = self.transformer.context(x, attention_mask, position_ids, past_key_values)
        return self.transformer.run_prelude(x, context), self.config.n_layers_in_prelude

    def initialize_state(
        self, input_embeds: torch.Tensor, position_ids: torch.Tensor | None = None, state_seed: int | None = None
    ) -> torch.Tensor:
        """s_0 for e `[B, T, D]`, of the same shape and dtype; positions count from 0 if not given."""
        if position_ids is None:
            position_ids = torch.arange(input_embeds.shape[1], device=input_embeds.device)[None]
        return self.transformer.initial_state(input_embeds, position_ids, state_seed)

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
        context = self.transformer.context(input_embeds, attention_mask, position_ids, past_key_values)
        state = self.transformer.step(input_embeds, input_states, context, current_step + 1)
        return state, block_idx + self.config.n_layers_in_recurrent_block, current_step + 1

    def predict_from_latents(
        self,
        latents: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: RecurrentDepthCache | None = None,
    ) -> RecurrentDepthOutput:
        """Last of the step calls: coda and head on a state `[B, T, D]`. With a cache, ends the pass."""
        context = self.transformer.context(latents, attention_mask, position_ids, past_key_values)
        latent_states, hidden = self.transformer.leave(latents, context)
        return RecurrentDepthOutput(
            logits=self.logits(hidden), past_key_values=past_key_values, latent_states=latent_states
        )

    def states_by_step(
        self,
        input_ids: torch.Tensor,
        num_steps: int,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        state_seed: int | None = None,
    ) -> Iterator[torch.Tensor]:
        """The states of one pass over `[B, T]`, without a cache: s_0, s_1, … s_r, each `[B, T, D]`.

        `predict_from_latents` reads the logits of any of them. Made of the step calls, which FSDP can be told about.
        """
        embedded, _ = self.embed_inputs(input_ids, attention_mask, position_ids)
        state = self.initialize_state(embedded, position_ids, state_seed)
        yield state
        for step in range(num_steps):
            state, _, _ = self.iterate_one_step(embedded, state, position_ids, attention_mask, current_step=step)
            yield state

    def unrolled(self, num_steps: int | None = None) -> UnrolledForCausalLM:
        """This model at one depth, as an ordinary one of prelude + r · core + coda layers that shares its weights.

        For whoever keeps keys and values layer by layer, such as transformers' continuous batching: `generate_batch`.

        Args:
            num_steps: r; the config's `default_num_steps` by default.

        Raises:
            ValueError: for num_steps < 1, and a model with layers that are recurrent in time.
        """
        if self.config.has_lru:
            raise UserError("layers that are recurrent in time keep states, and can't be unrolled; use model.generate")
        chosen = num_steps if num_steps is not None else self.config.default_num_steps
        _, steps = split_num_steps(chosen, self.config.max_num_steps)
        config = UnrolledConfig(recurrent=self.config.to_dict(), num_steps=steps)
        config._attn_implementation = self.config._attn_implementation
        config.auto_map = {"AutoModel": "unrolled.UnrolledModel"}  # saving adds only the class of what is saved
        unrolled = UnrolledForCausalLM(config, self.transformer, self.lm_head)
        unrolled.generation_config = copy(self.generation_config)
        return unrolled.train(self.training)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: RecurrentDepthCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        input_states: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        policy: DepthPolicy | None = None,
        num_steps: int | tuple[int, int] | torch.Tensor | None = None,
        criterion: str | ExitTest | Measure | None = None,
        exit_threshold: float | str | None = None,
        min_steps: int | None = None,
        continuous_compute: bool | None = None,
        state_seed: int | None = None,
        cache_rule: str | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        loss_only: bool = False,
        token_loss: TokenLoss = cross_entropy_of_tokens,
        step_labels: torch.Tensor | None = None,
        step_weights: Sequence[float] | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> RecurrentDepthOutput | tuple[Any, ...]:
        """
        Args:
            input_ids: `[B, T]`; or `inputs_embeds` `[B, T, D]`.
            attention_mask: `[B, S]`, 1 for tokens and 0 for padding, on either side.
            input_states: s_0 `[B, T, D]`, in place of the config's initial state.
            labels: `[B, T]`, shifted inside; -100 is left out of the loss. `shift_labels` are taken as they are.
            policy: how deep to go; or its keywords `num_steps`, `criterion`, `exit_threshold`, `min_steps`,
                `continuous_compute`, `state_seed` and `cache_rule`, which `DepthPolicy.resolve` explains.
            logits_to_keep: how many last tokens get logits, 0 for all, or their indices.
            loss_only: with labels, compute the loss a few tokens at a time and return no logits.
            token_loss: the loss of some tokens under `loss_only`; the cross-entropy by default.
            step_labels: `[B, S, T]`, under `loss_only` in place of `labels`: for each of the last S steps its own, each of
                which leaves through coda and head.
            step_weights: of those S losses in the whole; equal by default.

        Raises:
            ValueError: for num_steps < 1, a mask that can't be honoured, or more tokens than `block_size`.
            TypeError: for an unknown argument or a cache of another model.
        """
        check_arguments(kwargs)
        if kwargs.get("output_attentions", self.config.output_attentions):
            raise UserError(
                "output_attentions is not supported, as an argument or in the config; a core layer has one attention map for "
                "each step"
            )
        keywords = {
            "num_steps": num_steps,
            "criterion": criterion,
            "exit_threshold": exit_threshold,
            "min_steps": min_steps,
            "continuous_compute": continuous_compute,
            "state_seed": state_seed,
            "cache_rule": cache_rule,
        }
        outputs = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            input_states=input_states,
            policy=policy,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            head=self.logits,
            supervised_steps=1 if step_labels is None else step_labels.shape[1],
            **{name: value for name, value in keywords.items() if value is not None},
        )
        hidden, logits, loss = outputs.last_hidden_state, None, None
        has_labels = labels is not None or shift_labels is not None
        items = kwargs.get("num_items_in_batch")
        if loss_only and (has_labels or step_labels is not None):
            left = outputs.step_hidden_states or (hidden,)
            asked = [labels] * len(left) if step_labels is None else step_labels.unbind(1)
            weights = list(step_weights) if step_weights is not None else [1.0] * len(left)
            losses = [
                chunked_cross_entropy(
                    hidden_of_step,
                    labels_of_step,
                    self.logits,
                    self.config.vocab_size,
                    items,
                    token_loss,
                    parameters=self.lm_head.parameters(),
                    shift_labels=shift_labels if step_labels is None else None,
                    sharded=hasattr(self.lm_head, "unshard"),
                )
                for hidden_of_step, labels_of_step in zip(left, asked, strict=True)
            ]
            shares = torch.tensor(weights, device=losses[0].device) / sum(weights)
            loss = (torch.stack(losses) * shares).sum()
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.logits(hidden[:, kept])
            if has_labels:
                loss = self.loss_function(
                    logits=logits,
                    labels=labels,
                    vocab_size=self.config.vocab_size,
                    num_items_in_batch=items,
                    shift_labels=shift_labels,
                )
        output = RecurrentDepthOutput(
            loss=loss,
            logits=logits,
            log_ppl=loss.detach() if loss is not None else None,
            past_key_values=outputs.past_key_values,
            latent_states=outputs.latent_states,
            hidden_states=outputs.hidden_states,
            stats=outputs.stats,
        )
        return output if return_dict is not False else output.to_tuple()


def check_arguments(unnamed: dict[str, Any]) -> None:
    """Look through what `forward` was given beside its named arguments.

    Raises:
        TypeError: for an argument that redepth does not know; a checkpoint's own copy of the code warns once instead, so
            that an argument added to transformers later does not break it.
    """
    for name in sorted(set(unnamed) - TAKEN_ARGUMENTS):
        if not IS_EXPORTED:
            raise TypeError(f"forward() got an unknown argument {name!r}; see its documentation")
        logger.warning_once(f"forward() got an unknown argument {name!r}, which is ignored")


# transformers then copies these modules into every folder it saves, so that the folder loads without redepth.
RecurrentDepthConfig.register_for_auto_class()
RecurrentDepthForCausalLM.register_for_auto_class("AutoModelForCausalLM")
