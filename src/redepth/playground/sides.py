"""What one side of the page asks for, and what came of it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from redepth.checkpoint.cost import ParameterCount, count_parameters
from redepth.modeling import DepthPolicy
from redepth.modeling.exits import EXIT_TESTS
from redepth.serving.answers import Answer, Piece
from redepth.serving.limits import Refusal
from redepth.serving.served import Served

from .problems import Example, is_right
from .shading import Unit, answer_html

FIXED = "none: all steps"
TESTS = (FIXED, *EXIT_TESTS)


@dataclass
class Side:
    """One answer on the page.

    Attributes:
        most: the deepest that its shades reach, which both sides share.
    """

    served: Served
    count: ParameterCount
    answer: Answer
    most: int
    units: list[Unit] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float = 0.0

    def take(self, piece: Piece) -> None:
        self.last = time.perf_counter()
        self.first = self.first or self.last
        done = self.units[-1].place + 1 if self.units else 0
        if piece.tokens:
            steps = tuple(token.steps for token in piece.tokens)
            self.units.append(Unit(piece.text, done + len(steps) - 1, steps))

    @property
    def text(self) -> str:
        return "".join(unit.text for unit in self.units)

    def html(self, label: str) -> str:
        return answer_html(self.units, self.most, label)

    def stats(self, example: Example | None) -> str:
        """Steps, speed and price of the answer, and whether it is right where that is known."""
        steps = self.answer.steps
        if not steps:
            return stats_html("waiting for its turn")
        said = [f"{len(steps)} token{'s' if len(steps) > 1 else ''}", f"{sum(steps) / len(steps):.1f} steps each"]
        if len(steps) > 1 and self.first is not None and self.last > self.first:
            said.append(f"{(len(steps) - 1) / (self.last - self.first):.1f} tokens/s")
        said.append(f"{flops_in_words(sum(self.count.forward_flops_per_token(taken) for taken in steps))}")
        mark = ""
        if example is not None and self.answer.finish is not None:
            right = is_right(self.text, example.right)
            mark = (
                '<span class="rd-mark rd-right">✓ right</span>'
                if right
                else f'<span class="rd-mark rd-wrong">✗ wrong: it is {escape(example.right)}</span>'
            )
        return stats_html(" · ".join(said), mark)

    def chosen(self, place: int) -> tuple[list[int], str, int]:
        """The ids up to the one that a token was chosen after, the token's text, and its steps."""
        unit = next((unit for unit in self.units if unit.place == place), None)
        if unit is None:
            raise Refusal("there is no such token; tap one of the answer")
        before = [token.id for token in self.answer.tokens[:place]]
        return self.answer.prompt + before, unit.text, self.answer.tokens[place].steps


def stats_html(said: str, mark: str = "") -> str:
    return f'<div class="rd-stats" role="status">{mark}{escape(said)}</div>'


def flops_in_words(flops: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if flops >= size:
            return f"{flops / size:.3g} {unit}FLOPs"
    return f"{flops:.0f} FLOPs"


def parameter_counts(models: Sequence[Served]) -> list[ParameterCount]:
    return [count_parameters(served.model.config) for served in models]


def policy_of(served: Served, depth: Any, test: str, threshold: str) -> DepthPolicy:
    """The policy that the controls of a side stand for.

    Raises:
        Refusal: as `Served.policy`, and for a threshold that is none.
    """
    keywords: dict[str, Any] = {"num_steps": int(depth)}
    if test != FIXED:
        keywords["criterion"] = test
        if threshold.strip():
            keywords["exit_threshold"] = number_or_word(threshold.strip())
    return served.policy(**keywords)


def number_or_word(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
