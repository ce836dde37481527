"""Exit tests: whether a token's state has settled, so that it may leave the loop (Geiping et al. 2025, section 6.1).

Each test compares a token after step i with the same token after step i − 1. Shapes: N tokens still in the loop, D width,
V vocabulary.
"""

import difflib
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from inspect import signature
from typing import Any

import torch
from torch.nn import functional as F

from .errors import UserError
from .extensions import is_import_path, load_extension, registered_names

EXIT_TEST_GROUP = "redepth.exit_tests"  # of entry points
TOKENS_AT_ONCE = 64  # whose logits are widened to fp32
# A larger table of one step's logits is not kept: they are made again from what the coda left, at the price of the head.
LARGEST_TABLE = 256 * 2**20  # bytes

# (new, old) → what is compared with the threshold, `[N]`; states are [N, D], logits [N, V] in fp32, or what a test
# remembers of them.
Measure = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ExitTest:
    """A token leaves after the step at which `measure` falls below the threshold.

    Attributes:
        of_logits: whether the test looks at logits, which costs a pass through coda and head at every step, or at states.
        threshold: the default, what `auto` means.
        streak: how many steps in a row have to pass; where it is None, the threshold is that number.
        remembers: states or logits → all that `measure` needs of a step, `[N, …]`; without it, they themselves.
    """

    name: str
    of_logits: bool
    threshold: float
    measure: Measure
    streak: int | None = 1
    remembers: Callable[[torch.Tensor], torch.Tensor] | None = None

    def compare(self, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        """The measure of N tokens, `[N]`, from their states `[N, D]` or logits `[N, V]` after this step and the one before.

        Raises:
            ValueError: where the measure gives anything else.
        """
        return self.measured(*(new, old) if self.remembers is None else (self.remembers(new), self.remembers(old)))

    def measured(self, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        """As `compare`, of what is remembered of both steps."""
        measured: Any = self.measure(new, old)
        if not isinstance(measured, torch.Tensor) or measured.shape != new.shape[:1]:
            got = list(measured.shape) if isinstance(measured, torch.Tensor) else type(measured).__name__
            raise UserError(
                f"exit test {self.name!r} gave {got} for {len(new)} tokens; return one number for each, a tensor of shape [N]"
            )
        return measured


def kl(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """KL(p_i ‖ p_{i−1}) of the next-token distributions, in nats."""
    log_new, log_old = F.log_softmax(new, dim=-1), F.log_softmax(old, dim=-1)
    return (log_new.exp() * (log_new - log_old)).sum(-1)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """H(p) of the next-token distributions, in nats."""
    log_p = F.log_softmax(logits, dim=-1)
    return -(log_p.exp() * log_p).sum(-1)


def difference(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """|H(p_i) − H(p_{i−1})|, in nats, of the two entropies."""
    return (new - old).abs()


def latent_difference(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """‖s_i − s_{i−1}‖ / ‖s_i‖."""
    return (new - old).norm(dim=-1) / new.norm(dim=-1)


def cosine_distance(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """1 − cos(s_i, s_{i−1})."""
    return 1 - F.cosine_similarity(new, old, dim=-1)


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """The likeliest token."""
    return logits.argmax(-1)


def changed(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Whether the likeliest token changed: 0 or 1."""
    return (new != old).float()


EXIT_TESTS = {
    test.name: test
    for test in (
        ExitTest("kl", True, 5e-4, kl),
        ExitTest("entropy-diff", True, 1e-3, difference, remembers=entropy),
        ExitTest("latent-diff", False, 0.03, latent_difference),
        ExitTest("cosine", False, 1e-3, cosine_distance),
        # The threshold is the number of steps in a row without a change.
        ExitTest("argmax-stability", True, 5, changed, streak=None, remembers=argmax),
    )
}


def find_exit_test(criterion: str | ExitTest | Measure) -> ExitTest:
    """The test that a caller names or gives; a callable (new states, old states) → `[N]` becomes one with threshold 0.03.

    Args:
        criterion: one of `EXIT_TESTS`, a name that an installed package registers under `redepth.exit_tests`, or an
            import path `package.module:name`. Importing runs code, so a path must be the caller's own words.

    Raises:
        ValueError: for an unknown name, and for a path that can't be imported or leads to no test.
    """
    if not isinstance(criterion, str):
        said = f"unknown exit criterion {criterion!r}"
        return _as_exit_test(criterion, getattr(criterion, "__name__", "callable"), said)
    if criterion in EXIT_TESTS:
        return EXIT_TESTS[criterion]
    if not is_import_path(criterion):
        known = [*EXIT_TESTS, *registered_names(EXIT_TEST_GROUP)]
        if criterion not in known:
            near = difflib.get_close_matches(criterion, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"use {', '.join(known)} or package.module:name"
            raise UserError(f"unknown exit criterion {criterion!r}; {hint}")
    test = _as_exit_test(load_extension(criterion, EXIT_TEST_GROUP), criterion, f"exit criterion {criterion!r}")
    # By the name that was asked for, since thresholds are stored and looked up by it.
    return replace(test, name=criterion)


def _as_exit_test(given: Any, name: str, said: str) -> ExitTest:
    """A test or a callable as a test.

    Args:
        said: how the message names what is neither.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(given, ExitTest):
        return given
    if all(hasattr(given, field.name) for field in fields(ExitTest) if field.default is MISSING):
        # The code in a checkpoint has a class of its own, which an extension knows nothing of.
        known = {field.name: getattr(given, field.name) for field in fields(ExitTest) if hasattr(given, field.name)}
        return ExitTest(**known)
    if not callable(given):
        raise UserError(f"{said} is of type {type(given).__name__}; give a function or an ExitTest")
    try:
        signature(given).bind(None, None)
    except TypeError:
        raise UserError(
            f"exit criterion {name!r} can't be called with (new, old), the states [N, D] of N tokens"
        ) from None
    except ValueError:
        pass  # built-in functions need not tell their arguments
    return ExitTest(name, False, 0.03, given)


class ExitTracker:
    """One test followed over the steps of one pass.

    Args:
        test: what is compared.
        threshold: below which a comparison passes; of a test that counts steps, their number.
        min_steps: steps that every token runs; a comparison needs two, so no token leaves before the second.
    """

    def __init__(self, test: ExitTest, threshold: float, min_steps: int) -> None:
        self.test = test
        self.min_steps = min_steps
        self.streak_needed = test.streak if test.streak is not None else threshold
        # A test whose threshold counts steps passes at a step where its measure is zero.
        self.threshold = threshold if test.streak is not None else 0.5
        self._old: torch.Tensor | None = None
        # Whether `_old` holds what the head makes logits of, and not what is remembered of them.
        self._makes_again = False
        self._streak: torch.Tensor | None = None

    def looks_at(self, step: int) -> bool:
        """Whether the test needs to see a step at all: not those before the last that can't let a token go."""
        return self.streak_needed > 1 or step >= self.min_steps - 1

    def settled(
        self,
        new: torch.Tensor,
        tokens: torch.Tensor,
        step: int,
        head: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Which tokens may leave after this step.

        Args:
            new: states `[N, D]` or logits `[N, V]` of the tokens still in the loop.
            tokens: `[N]`, their indices among all tokens of the pass, by which measures are remembered between steps.
            step: counted from 1.
            head: makes what is looked at of `new`, for a few tokens at a time.

        Returns:
            `[N]`, bool.
        """
        # Padding may have left already; tokens are in order, and later ones are among these.
        count = int(tokens[-1]) + 1
        if self._streak is None:
            self._streak = torch.zeros(count, device=new.device)
        is_first, left = self._old is None, []
        # fp32 is for a few tokens at once; what is kept of the step before has the dtype in which it was made.
        for part, these in zip(new.split(TOKENS_AT_ONCE), tokens.split(TOKENS_AT_ONCE), strict=True):
            looked_at = head(part) if head is not None else part
            kept = looked_at if self.test.remembers is None else self.test.remembers(looked_at.float())
            if self._old is None:
                whole_table = head is not None and self.test.remembers is None
                self._makes_again = whole_table and count * kept[0].nbytes > LARGEST_TABLE
                pattern = part if self._makes_again else kept
                self._old = pattern.new_empty(count, *pattern.shape[1:])
            if not is_first:
                old = self._old[these]
                if self._makes_again:
                    assert head is not None
                    old = head(old)
                passed = self._measured(kept, old) < self.threshold
                self._streak[these] = torch.where(passed, self._streak[these] + 1, 0.0)
            self._old[these] = part if self._makes_again else kept
            left.append((self._streak[these] >= self.streak_needed) & (step >= self.min_steps) & (not is_first))
        return torch.cat(left)

    def _measured(self, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        if self.test.remembers is None:
            return self.test.measured(new.float(), old.float())
        return self.test.measured(new, old)
