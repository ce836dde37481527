"""Which way of decoding `generate`'s arguments ask for, checked against each other before any compute."""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

from .cache import parse_cache_rule
from .configuration import RecurrentDepthConfig
from .depth import split_num_steps
from .errors import UserError
from .exits import ExitPolicy
from .speculation import check_draft, speculative_decoding
from .wavefront import CACHE_RULE as WAVEFRONT_RULE
from .wavefront import check_wavefront, wavefront_decoding

# What goes with transformers' own decoding alone.
ONE_TOKEN_AT_A_TIME = (
    "criterion",
    "continuous_compute",
    "assistant_model",
    "prompt_lookup_num_tokens",
    "custom_generate",
)


def cache_rule_for(config: RecurrentDepthConfig, rule: str | None, criterion: Any) -> str:
    """The rule of a new cache; a criterion needs one that says what an exited token shows at its deeper steps.

    Raises:
        ValueError: for an unknown rule, and for one that can't go with a criterion.
    """
    if criterion is None:
        return rule if rule is not None else config.cache_rule
    if rule is None:
        return config.cache_rule if parse_cache_rule(config.cache_rule).missing != "refuse" else "latest"
    if parse_cache_rule(rule).missing == "refuse":
        # Recurrent layers take no combination of rules, so that `latest` alone is left.
        joined = "latest" if rule == "full" or config.has_recurrence else f"latest+{parse_cache_rule(rule).name}"
        raise UserError(f"a criterion can't go with cache rule {rule!r}, which needs every step; use {joined!r}")
    return rule


def exit_policy(
    config: RecurrentDepthConfig, criterion: Any, exit_threshold: float | str, min_steps: int, num_steps: int
) -> ExitPolicy:
    """The policy of one pass; a wanted agreement such as `99%` becomes the threshold that calibration found for it.

    Raises:
        ValueError: as `ExitPolicy`, and for an agreement that was not calibrated.
    """
    if isinstance(exit_threshold, str) and exit_threshold.endswith("%"):
        thresholds = (config.depth_profile or {}).get("thresholds", {})
        found = thresholds.get(criterion, {}).get(exit_threshold) if isinstance(criterion, str) else None
        if found is None:
            known = [wanted for wanted, value in thresholds.get(str(criterion), {}).items() if value is not None]
            hint = f"use {', '.join(known)} or a number" if known else "give a number, or run redepth calibrate"
            raise UserError(f"this checkpoint has no threshold of {criterion!r} for {exit_threshold!r}; {hint}")
        exit_threshold = found
    return ExitPolicy(criterion, exit_threshold, min_steps, num_steps)


def choose_decoding(config: RecurrentDepthConfig, arguments: dict[str, Any]) -> Callable[..., Any] | None:
    """The decoding method that these arguments ask for; None for transformers' own.

    Takes out of `arguments` what the method is given already, and fills in its `num_steps` and `cache_rule`.

    Raises:
        ValueError: for a value out of range, and for policies that exclude each other.
    """
    given = arguments.get("num_steps")
    num_steps = sum(split_num_steps(given if given is not None else config.default_num_steps))
    draft_steps, draft_tokens = arguments.pop("draft_steps", None), arguments.pop("draft_tokens", None)
    sampler = arguments.pop("sampler", None)
    if draft_tokens is not None and draft_steps is None:
        raise UserError("draft_tokens needs draft_steps; give the depth of the draft")
    if draft_steps is None and sampler is None:
        criterion = arguments.get("criterion")
        if criterion is not None:
            exit_policy(
                config, criterion, arguments.get("exit_threshold", "auto"), arguments.get("min_steps", 1), num_steps
            )
        parse_cache_rule(cache_rule_for(config, arguments.get("cache_rule"), criterion))
        return None
    name = "draft_steps" if sampler is None else f"sampler={sampler!r}"
    if config.has_recurrence:
        raise UserError(f"{name} can't go with recurrent layers, whose states can't be taken back; leave it out")
    excluded = [other for other in ONE_TOKEN_AT_A_TIME if arguments.get(other)]
    excluded += ["draft_steps"] if sampler is not None and draft_steps is not None else []
    excluded += ["use_cache=False"] if arguments.get("use_cache") is False else []
    if excluded:
        raise UserError(f"{name} can't go with {excluded[0]}; choose one of them")
    arguments["num_steps"] = num_steps
    if sampler is None:
        check_draft(draft_steps, draft_tokens, num_steps)
        return partial(speculative_decoding, draft_steps=draft_steps, draft_tokens=draft_tokens)
    if sampler != "wavefront":
        raise UserError(f"unknown sampler {sampler!r}; use 'wavefront', or leave it out")
    settings = {name: arguments.pop(name) for name in signature(check_wavefront).parameters if name in arguments}
    arguments["cache_rule"] = arguments.get("cache_rule") or WAVEFRONT_RULE
    return partial(wavefront_decoding, settings=check_wavefront(**settings))
