"""An evaluation in tables, of text alone: for the terminal and for Markdown."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .scores import SHARES, Difference, Score
from .texts import TextLoss


@dataclass(frozen=True)
class TextTable:
    title: str
    header: list[str]
    rows: list[list[str]]

    def as_markdown(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return f"## {self.title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_error(value: float, error: float | None, digits: int, sign: bool = False) -> str:
    """`53.0 ± 5.0`; the error is left out where there is none."""
    told = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return told if error is None or math.isnan(error) else f"{told} ± {error:.{digits}f}"


def with_unit(number: float) -> str:
    """`269 M`, to three digits."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def score_tables(scores: Sequence[Score], differences: Sequence[Difference]) -> list[TextTable]:
    """A table for each task, a row for each metric, model and depth.

    The differences shown are those from the first row of the same metric, paired over documents.
    """
    found = []
    apart = {
        (one.task, one.metric, one.filter, one.model, one.depth, one.model_from, one.depth_from): one
        for one in differences
    }
    several = len({score.model for score in scores}) > 1
    for task in dict.fromkeys(score.task for score in scores):
        own = [score for score in scores if score.task == task]
        rows = []
        for metric, kind in dict.fromkeys((score.metric, score.filter) for score in own):
            alike = [score for score in own if (score.metric, score.filter) == (metric, kind)]
            first, scale, digits = alike[0], *((100, 1) if metric in SHARES else (1, 3))
            for score in alike:
                moved = apart.get((task, metric, kind, score.model, score.depth, first.model, first.depth))
                error = None if score.standard_error is None else scale * score.standard_error
                rows.append(
                    [
                        metric if kind == "none" else f"{metric}, {kind}",
                        *([score.model] if several else []),
                        score.depth,
                        with_error(scale * score.value, error, digits),
                        with_error(scale * moved.difference, scale * moved.standard_error, digits, True)
                        if moved
                        else "",
                        f"{score.mean_steps:.2f}" if score.mean_steps else "",
                        with_unit(score.flops_per_token),
                        with_unit(score.flops_per_answer),
                        with_unit(score.effective_parameters),
                    ]
                )
        header = ["metric", *(["model"] if several else []), "depth", "value", "from the first", "mean steps"]
        header += ["FLOPs/token", "FLOPs/answer", "effective parameters"]
        found.append(TextTable(f"{task}, {own[0].answers} documents", header, rows))
    return found


def apart(one: TextLoss) -> str:
    return with_error(one.difference, one.difference_error, 4, sign=True)


def text_tables(texts: Sequence[TextLoss]) -> list[TextTable]:
    """A table for each text, a row for each source, model and depth."""
    found = []
    several = len({one.model for one in texts}) > 1
    for text in dict.fromkeys(one.text for one in texts):
        own = [one for one in texts if one.text == text]
        rows = [
            [
                one.source,
                *([one.model] if several else []),
                one.depth,
                with_error(one.loss, one.standard_error, 4),
                f"{math.exp(min(one.loss, 700)):.2f}",
                "" if (one.model, one.depth) == (own[0].model, own[0].depth) else apart(one),
                f"{one.tokens:,}",
            ]
            for one in own
        ]
        header = [
            "source",
            *(["model"] if several else []),
            "depth",
            "loss, nats/token",
            "perplexity",
            "from the first",
        ]
        found.append(TextTable(text, [*header, "tokens"], rows))
    return found
