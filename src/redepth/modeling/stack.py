"""The stack: prelude, looped core, coda, and the loops over the core.

    e   = prelude(embed(x) * embed_scale)
    s_0 = initial state
    s_i = core(adapter([s_{i-1}; e]))         i = 1 … num_steps
    y   = norm(coda(s_r))                     Huginn also norms s_r before the coda

(Geiping et al. 2025, section 3.1; McLeish et al. 2025, section 3.) Every decoder, measurement and step call runs the
recurrence through these methods. Shapes: B batch, T new tokens, D width, V vocabulary.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from .adaptive import Head, run_adaptive
from .blocks import Block, norm
from .cache import RecurrentDepthCache
from .compiled import compiler_works, step_compiled
from .configuration import RecurrentDepthConfig
from .errors import UserError
from .few_tokens import can_run, product_by
from .passes import PassContext, check_cache, pass_context
from .policy import DepthPolicy
from .pretrained import RecurrentDepthPreTrainedModel
from .state import StateGate, initial_state


@dataclass
class StackOutput(ModelOutput):
    """
    Args:
        last_hidden_state: `[B, T, D]`, as the head takes it.
        past_key_values: the cache, where one is used.
        latent_states: s_r, `[B, T, D]`, as it enters the coda.
        hidden_states: see `RecurrentDepthOutput`.
        attentions: always None; transformers' heads ask.
        stats: see `RecurrentDepthOutput`.
        step_hidden_states: with `supervised_steps`, what `last_hidden_state` would be after each of the last so many steps.
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: RecurrentDepthCache | None = None
    latent_states: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: None = None
    stats: dict[str, Any] | None = None
    step_hidden_states: tuple[torch.Tensor, ...] | None = None


class RecurrentStack(RecurrentDepthPreTrainedModel):
    """Everything but the head; `model.transformer`, and transformers' base model.

    Its parts, by their published names: `wte`, `prelude`, `adapter`, `core_block`, `coda`, `ln_f`, perhaps `state_gate`.
    """

    def __init__(self, config: RecurrentDepthConfig) -> None:
        super().__init__(config)
        first_core = config.n_layers_in_prelude
        first_coda = first_core + config.n_layers_in_recurrent_block
        assert config.n_layers is not None
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.prelude = nn.ModuleList(Block(config, layer) for layer in range(first_core))
        self.adapter = nn.Linear(2 * config.n_embd, config.n_embd, bias=False)
        self.core_block = nn.ModuleList(Block(config, layer) for layer in range(first_core, first_coda))
        self.state_gate = StateGate(config.n_embd) if config.state_gate else None
        self.coda = nn.ModuleList(Block(config, layer) for layer in range(first_coda, config.n_layers))
        self.ln_f = norm(config, config.n_embd)
        # Training: keep only the states between steps, and run each step again in the backward pass.
        self.checkpoint_steps = False
        self.core_is_compiled = self.few_token_kernels = False  # see `compile_core`
        # Each is told of every `forward` before it runs (`start_pass`), and called with (part, layer, step, value, context)
        # as the parts are computed; what it returns takes the value's place. A layer is counted over the whole stack; the
        # step is 0 for the initial state and outside the core.
        self.watchers: tuple[Any, ...] = ()
        self.post_init()

    def __getitem__(self, part: str) -> nn.Module:
        """A part by its published name."""
        return self.get_submodule(part)

    def __setitem__(self, part: str, module: nn.Module) -> None:
        self.set_submodule(part, module)

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.wte = value  # type: ignore[assignment]

    def compile_core(self) -> bool:
        """Run passes over few new tokens by compiled kernels; whether it can be done.

        On a processor, in fp32 or quantised, every layer runs by the kernels of `few_tokens`, compiled once a machine in
        some seconds. Elsewhere torch.compile makes few kernels of the core's pass over one new token a row: the first such
        pass takes some seconds, as does the first of several rows; longer texts and other depths compile nothing again.
        Without a C++ compiler, or where neither knows the layers, one line says so, and everything runs as before.
        """
        self.core_is_compiled = not self.use_few_token_kernels() and compiler_works(self.device, self.core_block)
        return self.few_token_kernels or self.core_is_compiled

    def use_few_token_kernels(self, wanted: bool = True) -> bool:
        """Run passes over few tokens by the kernels of `few_tokens`, or no longer; whether they will.

        They read the same weights and give the same numbers, but for rounding, and the same ones for however many tokens and
        rows. Layers that they don't know, other dtypes and devices, gradients and longer passes run as ever.
        """
        works = wanted and can_run(self)
        for module in self.modules():
            if hasattr(module, "few_token_kernels"):
                module.few_token_kernels = works  # type: ignore[assignment]
        return works

    def context(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: RecurrentDepthCache | None = None,
        whole_masks: bool = False,
    ) -> PassContext:
        """What the layers share in a pass over `hidden` `[B, T, D]`; see `passes.pass_context`."""
        return pass_context(self.config, hidden, attention_mask, position_ids, cache, whole_masks)

    def embed(self, input_ids: torch.Tensor | None = None, inputs_embeds: torch.Tensor | None = None) -> torch.Tensor:
        """Token embeddings times `embed_scale`, `[B, T, D]`; `inputs_embeds` are taken before the scale."""
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give either input_ids or inputs_embeds, and not both")
        embedded = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        return embedded * self.config.embed_scale if self.config.embed_scale != 1 else embedded

    def run_layers(
        self,
        layers: nn.Module,
        x: torch.Tensor,
        context: PassContext,
        step: int = 0,
        record: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Some layers one after another on `x` `[B, T, D]`.

        Args:
            step: from 1 in the core, 0 elsewhere.
            record: takes every layer's output.
        """
        for layer in layers:  # type: ignore[attr-defined]
            x = layer(x, context, step)
            if record is not None:
                record.append(x)
        return x

    def run_prelude(
        self, x: torch.Tensor, context: PassContext, record: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Scaled embeddings `[B, T, D]` in, e `[B, T, D]` out."""
        return self.run_layers(self.prelude, x, context, record=record)

    def initial_state(self, embedded: torch.Tensor, position_ids: torch.Tensor, seed: int | None) -> torch.Tensor:
        """s_0 for e `[B, T, D]`, of the same shape and dtype.

        Args:
            position_ids: `[B or 1, T]`.
            seed: of a noise state; None for the config's, or in training mode for fresh noise.
        """
        return initial_state(self.config, embedded, position_ids, seed, fresh=self.training and seed is None)

    def step(
        self,
        embedded: torch.Tensor,
        state: torch.Tensor,
        context: PassContext,
        step: int,
        record: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """One pass through the core: s_{i−1} `[B, T, D]` in, s_i out.

        Args:
            embedded: e, `[B, T, D]`.
            step: i, from 1.
            record: takes every layer's output.
        """
        context = context.to(state.device).without_skipped(step, *state.shape[:2])
        embedded = embedded.to(state.device)
        skips = self.config.initial_state_mode == "skip-adapter" and step == 1
        compiled = self.core_is_compiled and record is None and not skips
        reached = step_compiled(self, embedded, state, context, step) if compiled else None
        if reached is None:
            injected = embedded
            if not skips or context.continued is not False:
                both = torch.cat([state, embedded], dim=-1)
                injected = product_by(self.adapter, self.few_token_kernels)(both)
            if skips and isinstance(context.continued, torch.Tensor):
                injected = torch.where(context.continued[..., None], injected, embedded.to(injected.device))
            reached = self.run_layers(self.core_block, injected, context, step, record)
        if self.state_gate is not None:
            reached = self.state_gate(state, reached, step == 1, context.continued)
        return context.watched("state", None, step, reached)

    def run_fixed(
        self,
        embedded: torch.Tensor,
        state: torch.Tensor,
        context: PassContext,
        last: int,
        first: int = 1,
        without_gradient: int = 0,
        record: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Steps `first` to `last` for all tokens; the state before them in, the one after them out."""
        checkpointing = self.checkpoint_steps and context.cache is None and record is None
        for step in range(first, last + 1):
            with torch.no_grad() if step <= without_gradient else nullcontext():
                if checkpointing and torch.is_grad_enabled():
                    state = checkpoint(self.step, embedded, state, context, step, use_reentrant=False)
                else:
                    state = self.step(embedded, state, context, step, record)
        return state

    def run_coda(
        self, state: torch.Tensor, context: PassContext, record: list[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """s_r in; (latent states, normed output), each `[B, T, D]`, out."""
        if self.config.norm_before_coda:
            state = self.ln_f(state)
        return state, self.ln_f(self.run_layers(self.coda, state, context, record=record))

    def leave(
        self,
        state: torch.Tensor,
        context: PassContext,
        record: list[torch.Tensor] | None = None,
        steps_run: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The coda, which ends the pass: what is cached now belongs to the past."""
        latent_states, hidden = self.run_coda(state, context, record)
        if context.cache is not None:
            context.cache.commit(latent_states, steps_run)
        return latent_states, hidden

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: RecurrentDepthCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        input_states: torch.Tensor | None = None,
        policy: DepthPolicy | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        head: Head | None = None,
        supervised_steps: int = 1,
        return_dict: bool | None = None,
        **keywords: Any,
    ) -> StackOutput | tuple[Any, ...]:
        """As `RecurrentDepthForCausalLM.forward`, up to the head.

        Args:
            head: for exit tests that look at logits.
            supervised_steps: how many of the last steps leave through the coda, for a loss at each of them.
            keywords: those of `DepthPolicy.resolve`, in place of a policy.
        """
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and self.training and self.is_gradient_checkpointing:
            raise UserError("use_cache=True can't go with gradient checkpointing; pass use_cache=False")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        cache = past_key_values
        check_cache(self.config, cache)
        held_rule = cache.rule if cache is not None else None
        if policy is None:
            policy = DepthPolicy.resolve(self.config, held_rule=held_rule, training=self.training, **keywords)
        elif keywords:
            raise UserError(f"give either a policy or {min(keywords)}, and not both")
        elif held_rule is not None and held_rule != policy.cache_rule:
            raise UserError(
                f"the policy has cache_rule={policy.cache_rule.name!r}, but past_key_values keeps {held_rule.name!r}; "
                f"resolve the policy with cache_rule={held_rule.name!r}, or leave the cache out"
            )
        if policy.test is not None:
            if output_hidden_states:
                raise UserError(
                    "output_hidden_states can't go with a criterion; tokens run different numbers of layers"
                )
            if torch.is_grad_enabled() and self.training:
                raise UserError("a criterion is for inference; call model.eval() and give num_steps as one number")
        if not 1 <= supervised_steps <= policy.num_steps:
            raise UserError(f"supervised_steps={supervised_steps} must be from 1 to num_steps={policy.num_steps}")
        if supervised_steps > 1 and (use_cache or cache is not None or policy.test is not None):
            raise UserError("supervised_steps is for training; pass use_cache=False, and no cache or criterion")
        if cache is None and (use_cache or policy.test is not None):
            cache = RecurrentDepthCache(self.config, policy.cache_rule.name)
        carried = None
        if policy.continuous_compute:
            carried = self._carried_state(cache)

        x = self.embed(input_ids, inputs_embeds)
        whole_masks = policy.test is not None or policy.cache_rule.missing == "skip"
        context = self.context(x, attention_mask, position_ids, cache, whole_masks)
        if cache is not None:
            cache.check_steps(policy.num_steps)
        for watcher in self.watchers:
            watcher.start_pass(x, context, policy.num_steps, attention_mask)
        context.watchers = self.watchers
        record = [x] if output_hidden_states else None
        embedded = context.watched("embedded", None, 0, self.run_prelude(x, context, record))
        state = input_states
        if state is None and carried is not None and embedded.shape[1] == 1:
            state = carried.to(embedded.device)
        context.continued = state is not None
        if state is None:
            state = self.initial_state(embedded, context.position_ids, policy.state_seed)
        state = context.watched("state", None, 0, state)
        steps_run = None
        left_before: list[torch.Tensor] = []
        stats: dict[str, Any] = {"num_steps": policy.num_steps}
        if policy.test is not None:
            assert cache is not None
            mask = cache.padding_mask
            real = mask[:, -x.shape[1] :].bool() if mask is not None else None
            state, steps_run, core_passes = run_adaptive(self, embedded, state, context, policy, real, head)
            stats = {"num_steps": steps_run, "core_passes": core_passes}
        else:
            done = 0
            for step in range(policy.num_steps - supervised_steps + 1, policy.num_steps + 1):
                state = self.run_fixed(embedded, state, context, step, done + 1, policy.without_gradient, record)
                done = step
                if step < policy.num_steps:
                    left_before.append(self.run_coda(state, context)[1])
        latent_states, hidden = self.leave(state, context, record, steps_run)
        output = StackOutput(
            last_hidden_state=hidden,
            past_key_values=cache if use_cache or past_key_values is not None else None,
            latent_states=latent_states,
            hidden_states=tuple(record) if record is not None else None,
            stats=stats,
            step_hidden_states=(*left_before, hidden) if supervised_steps > 1 else None,
        )
        return output if return_dict is not False else output.to_tuple()

    @staticmethod
    def _carried_state(cache: RecurrentDepthCache | None) -> torch.Tensor | None:
        """s_r of the token before, `[B, 1, D]`; None at the start of a text."""
        if cache is None:
            raise UserError("continuous_compute=True needs a cache to carry the state; leave use_cache on")
        if cache.last_state is None and cache.get_seq_length():
            raise UserError("continuous_compute=True can't continue from a cropped cache, whose last state is gone")
        return cache.last_state
