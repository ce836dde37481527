"""How many steps each token runs, and by which way of decoding: chosen and checked once for a call.

A `DepthPolicy` is resolved from a model's configuration and a caller's keywords, which every door takes alike:
`forward`, `generate`, the commands, a server. From then on it is only read.
"""

import math
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from inspect import signature
from typing import Any

import torch

from .cache_rules import CacheRule, parse_cache_rule
from .configuration import RecurrentDepthConfig
from .errors import UserError
from .exit_heads import calibrated_head
from .exits import ExitTest, ExitTracker, Measure, find_exit_test

EVERY_STEP = ("full", "latest")  # the rules that keep every step of a token, as a draft needs it
WAVEFRONT_RULE = "ring-1"  # every token exposes what it holds now
# Arguments of `generate` that work only where tokens are decoded one at a time.
ONE_TOKEN_AT_A_TIME = ("assistant_model", "prompt_lookup_num_tokens", "custom_generate")


def split_num_steps(num_steps: Any, most: int | None = None) -> tuple[int, int]:
    """(steps without gradient, steps with gradient) from an integer, a pair, or a tensor of one or two entries.

    A scalar puts every step under the gradient, so that training with a plain number gives gradients.

    Args:
        most: the largest sum that is accepted.

    Raises:
        ValueError: for anything else, for negative counts, for fewer than one step in all, and for more than `most`.
    """
    given = num_steps.tolist() if isinstance(num_steps, torch.Tensor) else num_steps
    if isinstance(given, (list, tuple)):
        counts = tuple(given) if len(given) != 1 else (0, given[0])
    else:
        counts = (0, given)
    if len(counts) != 2 or not all(_is_integer(count) for count in counts):
        raise UserError(f"num_steps takes an integer or a pair (without gradient, with gradient), got {num_steps!r}")
    without, with_gradient = (operator.index(count) for count in counts)
    if min(without, with_gradient) < 0 or without + with_gradient < 1:
        raise UserError(f"num_steps must be at least 1, got {num_steps!r}")
    if most is not None and without + with_gradient > most:
        raise UserError(f"num_steps is {num_steps!r}, but this model's max_num_steps is {most}; raise it in the config")
    return without, with_gradient


def _is_integer(value: Any) -> bool:
    """Whether it counts something: an int, or a number of numpy's or torch's that is one."""
    return hasattr(value, "__index__") and not isinstance(value, bool)


def sample_num_steps(mean: float, backprop_depth: int, generator: torch.Generator | None = None) -> tuple[int, int]:
    """Draw the depth of one training step (Geiping et al. 2025, section 3.3).

    p ~ Poisson(LogNormal(log m − σ²/2, σ = 0.5)) + 1 for mean m, as published; p itself has mean m + 1.

    Args:
        mean: m, above 0.
        backprop_depth: how many of the last steps carry a gradient.
        generator: torch's default one if left out.

    Returns:
        (steps without gradient, steps with gradient).
    """
    sigma = 0.5
    rate = torch.exp(math.log(mean) - sigma**2 / 2 + sigma * torch.randn((), generator=generator))
    steps = int(torch.poisson(rate, generator=generator)) + 1
    return max(steps - backprop_depth, 0), min(backprop_depth, steps)


@dataclass(frozen=True)
class Wavefront:
    """Settings of the wavefront sampler.

    Attributes:
        headway: how many places are opened at each pass.
        inner_steps: steps of the core in each pass, after which the tokens are predicted anew.
        exit_threshold: a place settles when ‖s − s_old‖ / ‖s‖ over one pass is below it.
        noise_mix: share of a fresh initial state mixed into every unsettled state before each pass.
        max_wavefront: the largest number of open places.
        report_agreement: measure in `stats["agreement"]` which share of the tokens plain decoding would have chosen.

    Raises:
        ValueError: for a value out of range.
    """

    headway: int = 1
    inner_steps: int = 4
    exit_threshold: float = 0.03
    noise_mix: float = 0.0
    max_wavefront: int = 64
    report_agreement: bool = False

    def __post_init__(self) -> None:
        for name in ("headway", "inner_steps", "max_wavefront"):
            count = getattr(self, name)
            if not _is_integer(count) or count < 1:
                raise UserError(f"{name} must be an integer of at least 1, got {count!r}")
        _check_threshold(self.exit_threshold)
        if not isinstance(self.noise_mix, (int, float)) or not 0 <= self.noise_mix < 1:
            raise UserError(f"noise_mix must be at least 0 and below 1, got {self.noise_mix!r}")


def _check_threshold(threshold: Any) -> None:
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not threshold > 0:
        raise UserError(f"exit_threshold must be 'auto' or above 0, got {threshold!r}")


@dataclass(frozen=True)
class DepthPolicy:
    """How r is chosen for a call or a request. Made by `resolve`, which checks; from then on only read.

    Attributes:
        num_steps: r, or the largest number of steps of a token where a test may end them earlier.
        without_gradient: how many of them, from the first, carry no gradient.
        test, threshold: the exit test of adaptive depth and its threshold; None at a fixed depth.
        min_steps: steps that every token runs under a test.
        draft_steps, draft_tokens: of self-speculative decoding; None where no tokens are drafted, or where as many are
            drafted as pay off.
        draft_bits: of the weights that draft; None for the model's own.
        wavefront: settings of the wavefront sampler; None where it is not asked for.
        cache_rule: which step of an earlier token is read at each step.
        state_seed: seed of a noise state; None for the config's, or in training for fresh noise.
        continuous_compute: whether a single new token starts from the s_r of the one before it.
    """

    num_steps: int
    cache_rule: CacheRule
    without_gradient: int = 0
    test: ExitTest | None = None
    threshold: float | None = None
    min_steps: int = 1
    draft_steps: int | None = None
    draft_tokens: int | None = None
    draft_bits: int | None = None
    wavefront: Wavefront | None = None
    state_seed: int | None = None
    continuous_compute: bool = False

    @classmethod
    def resolve(
        cls,
        config: RecurrentDepthConfig,
        *,
        num_steps: Any = None,
        criterion: str | ExitTest | Measure | None = None,
        exit_threshold: float | str | None = None,
        min_steps: int | None = None,
        draft_steps: int | None = None,
        draft_tokens: int | None = None,
        draft_bits: int | None = None,
        sampler: str | None = None,
        headway: int | None = None,
        inner_steps: int | None = None,
        noise_mix: float | None = None,
        max_wavefront: int | None = None,
        report_agreement: bool | None = None,
        cache_rule: str | None = None,
        state_seed: int | None = None,
        continuous_compute: bool | None = None,
        held_rule: CacheRule | None = None,
        training: bool = False,
    ) -> "DepthPolicy":
        """The policy that these keywords ask for; None leaves a choice to the config.

        Args:
            num_steps: an integer, or a pair (steps without gradient, steps with gradient). The config's
                `default_num_steps` by default; in training mode the default is drawn anew at each call.
            criterion: exit test of adaptive depth: `kl`, `entropy-diff`, `latent-diff`, `cosine`, `argmax-stability`,
                a callable on (new, old) states, an `ExitTest`, or what `find_exit_test` finds by name: a test that an
                installed package registers, or an import path `package.module:name`. Each token leaves when it
                passes, at the latest after num_steps.
            exit_threshold: the test's or the sampler's; `auto` for its default, or of a test a calibrated agreement
                such as `99%`.
            min_steps: steps that every token runs under a criterion.
            draft_steps: draft tokens with this few steps and verify them with `num_steps` in one pass (self-speculative
                decoding): the same output, or the same distribution, sooner.
            draft_tokens: how many are drafted at a time; by default it follows how many were accepted.
            draft_bits: 8 to draft with a copy of the weights in 8 bits, or 16 where those are faster; see `drafting`.
            sampler: `wavefront`: all unsettled tokens advance together, a few steps each; not lossless.
            headway, inner_steps, noise_mix, max_wavefront, report_agreement: its settings, see `Wavefront`.
            cache_rule: a rule or a published alias, see `RecurrentDepthCache`.
            state_seed: seed of a noise state.
            continuous_compute: a single new token starts from the s_r of the one before it, which the cache holds,
                instead of the initial state (warm start, "continuous chain of thought"). Prompts start from the usual
                initial state.
            held_rule: the rule of a cache that exists already.
            training: whether the model is in training mode.

        Raises:
            ValueError: for a value out of range, and for choices that exclude each other.
        """
        if num_steps is None and training:
            without, with_gradient = sample_num_steps(config.mean_recurrence, config.mean_backprop_depth)
        else:
            chosen = num_steps if num_steps is not None else config.default_num_steps
            without, with_gradient = split_num_steps(chosen, config.max_num_steps)
        total = without + with_gradient
        settings: dict[str, Any] = {
            "headway": headway,
            "inner_steps": inner_steps,
            "noise_mix": noise_mix,
            "max_wavefront": max_wavefront,
            "report_agreement": report_agreement,
        }
        settings = {name: value for name, value in settings.items() if value is not None}
        for name, value in (("draft_tokens", draft_tokens), ("draft_bits", draft_bits)):
            if value is not None and draft_steps is None:
                raise UserError(f"{name} needs draft_steps; give the depth of the draft")
        if draft_steps is not None or sampler is not None:
            name = "draft_steps" if sampler is None else f"sampler={sampler!r}"
            excluded = ["criterion"] if criterion is not None else []
            excluded += ["continuous_compute"] if continuous_compute else []
            excluded += ["draft_steps"] if sampler is not None and draft_steps is not None else []
            if config.has_lru:
                raise UserError(
                    f"{name} can't go with recurrent layers, whose states can't be taken back; leave it out"
                )
            if excluded:
                raise UserError(f"{name} can't go with {excluded[0]}; choose one of them")
        wavefront = None
        if sampler is not None:
            if sampler != "wavefront":
                raise UserError(f"unknown sampler {sampler!r}; use 'wavefront', or leave it out")
            if exit_threshold not in (None, "auto"):
                settings["exit_threshold"] = exit_threshold
            wavefront = Wavefront(**settings)
        elif settings:
            raise UserError(f"{min(settings)} needs sampler='wavefront'; add it, or leave {min(settings)} out")
        test = threshold = None
        if criterion is not None:
            test = find_exit_test(criterion)
            test, threshold = _test_and_threshold(config, test, criterion, exit_threshold)
            if without:
                raise UserError("a criterion is for inference; call model.eval() and give num_steps as one number")
        elif sampler is None and exit_threshold not in (None, "auto"):
            raise UserError(f"exit_threshold={exit_threshold!r} needs a criterion; add one, or leave it out")
        if min_steps is not None and criterion is None:
            raise UserError(f"min_steps={min_steps!r} needs a criterion; add one, or leave it out")
        least = 1 if min_steps is None else min_steps
        if not _is_integer(least) or not 1 <= least <= total:
            raise UserError(f"min_steps must be between 1 and num_steps ({total}), got {min_steps!r}")
        rule = chosen_rule(config, cache_rule, held_rule, criterion is not None, draft_steps is not None, wavefront)
        if draft_steps is not None:
            if not _is_integer(draft_steps) or not 1 <= draft_steps < total:
                raise UserError(f"draft_steps must be between 1 and num_steps - 1 ({total - 1}), got {draft_steps!r}")
            if draft_tokens is not None and (not _is_integer(draft_tokens) or draft_tokens < 1):
                raise UserError(f"draft_tokens must be at least 1, got {draft_tokens!r}")
            if draft_bits not in (None, 8):
                raise UserError(f"draft_bits must be 8, got {draft_bits!r}; leave it out for the model's own weights")
        if state_seed is not None and not _is_integer(state_seed):
            raise UserError(f"state_seed takes an integer, got {state_seed!r}")
        return cls(
            num_steps=total,
            cache_rule=rule,
            without_gradient=without,
            test=test,
            threshold=threshold,
            min_steps=least,
            draft_steps=draft_steps,
            draft_tokens=draft_tokens,
            draft_bits=draft_bits,
            wavefront=wavefront,
            state_seed=state_seed,
            continuous_compute=bool(continuous_compute),
        )

    @property
    def is_one_token_at_a_time(self) -> bool:
        """Whether transformers' own decoding loop serves it."""
        return self.draft_steps is None and self.wavefront is None

    def check_beside(self, arguments: Mapping[str, Any]) -> None:
        """Raises ValueError where other arguments of `generate` can't go with drafts or a sampler."""
        if self.is_one_token_at_a_time:
            return
        name = "draft_steps" if self.wavefront is None else "sampler='wavefront'"
        excluded = [other for other in ONE_TOKEN_AT_A_TIME if arguments.get(other)]
        excluded += ["use_cache=False"] if arguments.get("use_cache") is False else []
        if excluded:
            raise UserError(f"{name} can't go with {excluded[0]}; choose one of them")

    def tracker(self) -> ExitTracker | None:
        """The tracker of the exit test over one pass; None at a fixed depth."""
        if self.test is None or self.threshold is None:
            return None
        return ExitTracker(self.test, self.threshold, self.min_steps)

    def one_pass(self) -> "DepthPolicy":
        """The same depth for one forward pass, without drafts or sampler."""
        return replace(self, draft_steps=None, draft_tokens=None, draft_bits=None, wavefront=None)

    def __str__(self) -> str:
        """The choices in one line, named like the keywords."""
        steps = f"({self.without_gradient}, {self.num_steps - self.without_gradient})"
        said: dict[str, Any] = {"num_steps": steps if self.without_gradient else self.num_steps}
        if self.test is not None:
            said |= {"criterion": self.test.name, "exit_threshold": self.threshold, "min_steps": self.min_steps}
        if self.draft_steps is not None:
            said |= {"draft_steps": self.draft_steps, "draft_tokens": self.draft_tokens or "adapted"}
            said |= {} if self.draft_bits is None else {"draft_bits": self.draft_bits}
        if self.wavefront is not None:
            said |= {"sampler": "wavefront"} | asdict(self.wavefront)
        said["cache_rule"] = self.cache_rule.name
        if self.state_seed is not None:
            said["state_seed"] = self.state_seed
        if self.continuous_compute:
            said["continuous_compute"] = True
        return " ".join(f"{name}={value}" for name, value in said.items())


# What `forward` and `generate` take in place of a policy.
POLICY_KEYWORDS = tuple(
    name for name in signature(DepthPolicy.resolve).parameters if name not in ("config", "held_rule", "training")
)


def take_policy_keywords(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of POLICY_KEYWORDS that are given, taken out of `arguments`."""
    taken = {name: arguments.pop(name) for name in POLICY_KEYWORDS if name in arguments}
    return {name: value for name, value in taken.items() if value is not None}


def _test_and_threshold(
    config: RecurrentDepthConfig, test: ExitTest, criterion: Any, exit_threshold: float | str | None
) -> tuple[ExitTest, float]:
    """A test and its threshold; a wanted agreement such as `99%` becomes what calibration found for it.

    For a test of logits that is its exit head, where the calibration has fitted one.
    """
    if exit_threshold in (None, "auto"):
        return test, test.threshold
    if isinstance(exit_threshold, str) and exit_threshold.endswith("%"):
        head = calibrated_head(config.depth_profile or {}, test, exit_threshold, config.n_embd)
        if head is not None:
            return head
        by_agreement = (config.depth_profile or {}).get("thresholds", {}).get(str(criterion), {})
        calibrated = by_agreement.get(exit_threshold)
        if calibrated is None:
            known = [wanted for wanted, value in by_agreement.items() if value is not None]
            hint = f"use {', '.join(known)} or a number" if known else "give a number, or run redepth calibrate"
            raise UserError(f"this checkpoint has no threshold of {criterion!r} for {exit_threshold!r}; {hint}")
        return test, calibrated
    _check_threshold(exit_threshold)
    assert isinstance(exit_threshold, (int, float))
    return test, exit_threshold


def chosen_rule(
    config: RecurrentDepthConfig,
    rule: str | None,
    held: CacheRule | None = None,
    adaptive: bool = False,
    drafting: bool = False,
    wavefront: Wavefront | None = None,
) -> CacheRule:
    """The rule of the existing cache, or of a new one.

    A criterion needs a rule that says what stands in for an exited token's deeper steps, a draft one that keeps every
    step, and
    the wavefront the one under which every token exposes what it holds now.

    Raises:
        ValueError: for an unknown rule, and for one that can't go with the rest.
    """
    if held is not None:
        if rule is not None and parse_cache_rule(rule) != held:
            raise UserError(
                f"cache_rule={rule!r} does not fit the given cache, whose rule is {held.name!r}; leave it out, or start from an "
                "empty cache"
            )
        rule = held.name
    if wavefront is not None and rule is None:
        return parse_cache_rule(WAVEFRONT_RULE)
    if adaptive and rule is None and parse_cache_rule(config.cache_rule).missing == "refuse":
        return parse_cache_rule("latest")
    chosen = parse_cache_rule(rule if rule is not None else config.cache_rule)
    if wavefront is not None and chosen.name != WAVEFRONT_RULE:
        raise UserError(f"the wavefront sampler reads by cache rule {WAVEFRONT_RULE!r}, not {rule!r}")
    if adaptive and chosen.missing == "refuse":
        # Recurrent layers do not support combined rules, so `latest` is the only choice.
        joined = "latest" if chosen.name == "full" or config.has_lru else f"latest+{chosen.name}"
        raise UserError(f"a criterion can't go with cache rule {rule!r}, which needs every step; use {joined!r}")
    if drafting and chosen.name not in EVERY_STEP:
        raise UserError(
            f"draft_steps can't go with cache rule {chosen.name!r}: a draft's keys and values would be read as a deeper "
            f"step's; use one of {', '.join(EVERY_STEP)}"
        )
    return chosen
