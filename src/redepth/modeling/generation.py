"""transformers' `generate` for a depth-recurrent model: one policy for the whole call, one cache that knows about steps."""

from functools import partial
from typing import Any

import torch
from transformers.generation import GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.utils import ModelOutput, logging

from .cache import RecurrentDepthCache
from .configuration import RecurrentDepthConfig
from .errors import UserError
from .exits import ExitTest, Measure
from .extensions import is_import_path
from .policy import POLICY_KEYWORDS, DepthPolicy, take_policy_keywords
from .speculation import speculative_decoding
from .tokens import check_ids, check_numbers
from .wavefront import wavefront_decoding

logger = logging.get_logger(__name__)


class RefuseNaN(LogitsProcessor):
    """Stops a generation whose logits are NaN, where greedy decoding would continue in silence."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        check_numbers(scores)
        return scores


class RecurrentDepthGeneration(GenerationMixin):
    """`generate`, with how deep it goes resolved once."""

    config: RecurrentDepthConfig

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
            model_kwargs["past_key_values"] = RecurrentDepthCache(self.config, model_kwargs["policy"].cache_rule.name)
            if generation_config.is_assistant:
                model_kwargs["past_key_values"].activate_past_recording()

    def _prepare_generated_length(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Stop where the model's longest text ends: the last generated token is not run, so it needs no room."""
        prepared: Any = super()._prepare_generated_length(generation_config, *args, **kwargs)  # type: ignore[misc]
        most = self.config.block_size + 1
        if kwargs["input_ids_length"] < most < prepared.max_length:
            logger.warning(
                f"this model allows {self.config.block_size} tokens (block_size); the text ends there, at the latest after "
                f"{most - kwargs['input_ids_length']} new tokens"
            )
            prepared.max_length = most
        return prepared

    def _get_candidate_generator(self, **arguments: Any) -> Any:  # type: ignore[override]
        """An assistant goes as deep as its own config says: it may be another model, with no depth at all."""
        own = {name: value for name, value in arguments["model_kwargs"].items() if name != "policy"}
        return super()._get_candidate_generator(**arguments | {"model_kwargs": own})  # type: ignore[misc]

    def generate(  # type: ignore[override]
        self,
        inputs: torch.Tensor | None = None,
        generation_config: Any = None,
        *,
        policy: DepthPolicy | None = None,
        streamer: Any = None,
        assistant_model: Any = None,
        custom_generate: Any = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`, and two more ways of decoding (drafts, and the wavefront sampler).

        Args:
            policy: how deep to go; or the keywords of `DepthPolicy.resolve`, here, in `generation_config` or in the
                model's own `generation_config`, the nearest first.

        Returns:
            as `generate`; with `return_dict_in_generate=True` the output has `stats`, of which `num_steps` `[B,
            tokens]` is
            the steps of each token in the cache, and `is_full` says that the text ended because `block_size` was reached.

        Raises:
            ValueError: for policies that exclude each other, before any compute, and as `forward`.
        """
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        if ids is not None:
            check_ids(ids, self.config.vocab_size)
        keywords = take_policy_keywords(kwargs)
        cache = kwargs.get("past_key_values")
        if policy is None:
            held_rule = cache.rule if isinstance(cache, RecurrentDepthCache) else None
            settings = self._settings_of(generation_config)
            named = (settings | keywords).get("criterion")
            # A generation config comes with a checkpoint, which must not decide what code runs.
            if "criterion" not in keywords and isinstance(named, str) and is_import_path(named):
                raise UserError(
                    f"the generation config names exit test {named!r} by import path; if you trust that code, pass "
                    f"criterion={named!r} yourself"
                )
            keywords = settings | keywords
            policy = DepthPolicy.resolve(self.config, held_rule=held_rule, **keywords)
        elif keywords:
            raise UserError(f"give either a policy or {min(keywords)}, and not both")
        arguments = kwargs | {"custom_generate": custom_generate, "assistant_model": assistant_model}
        policy.check_beside(arguments)
        # Watchers (record, patch) are attached to the stack.
        if getattr(self, "transformer").watchers:  # noqa: B009
            beams = kwargs.get("num_beams") or getattr(generation_config or self.generation_config, "num_beams", None)
            if not policy.is_one_token_at_a_time or (beams or 1) > 1:
                raise UserError("record and patch follow plain decoding; leave draft_steps, sampler and num_beams out")
        self._warn_outside_calibration(policy.num_steps)
        arguments["policy"] = policy
        if policy.is_one_token_at_a_time:
            arguments["logits_processor"] = LogitsProcessorList([*(kwargs.get("logits_processor") or []), RefuseNaN()])
        else:
            decode = speculative_decoding if policy.wavefront is None else wavefront_decoding
            # transformers passes no streamer to a custom decoding method.
            arguments["custom_generate"] = partial(decode, streamer=streamer)
        transformers_generate: Any = super().generate  # type: ignore[misc]
        output = transformers_generate(inputs, generation_config, streamer=streamer, **arguments)
        if isinstance(output, ModelOutput):
            if "stats" not in output:
                cache = output.get("past_key_values")
                output["stats"] = {} if cache is None else {"num_steps": cache.steps_run}
            output["stats"]["is_full"] = output["sequences"].shape[1] > self.config.block_size
        return output

    def _settings_of(self, generation_config: Any) -> dict[str, Any]:
        """The policy's keywords that a generation config holds, the given one's before the model's own."""
        settings: dict[str, Any] = {}
        for config in (self.generation_config, generation_config):
            own = {name: getattr(config, name, None) for name in POLICY_KEYWORDS}
            settings |= {name: value for name, value in own.items() if value is not None}
        return settings

    def _warn_outside_calibration(self, num_steps: int) -> None:
        if self.config.depth_profile is None:
            return
        least, most = self.config.depth_profile["valid_range"]
        if not least <= num_steps <= most:
            logger.warning_once(
                f"num_steps={num_steps} is outside {least} to {most}, where calibration found this checkpoint sound; expect "
                "worse text, or calibrate deeper"
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
        # Without a criterion a call is a plain generate; with one, the published rule amounts to `latest`.
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
