"""An evaluation in tables, of text alone: for the terminal and for Markdown."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from redepth.data.source import is_task

from .published import PublishedTable
from .scores import SHARES, Difference, Score
from .tasks import TaskAccuracy
from .texts import NO_LOOP, TextLoss


@dataclass(frozen=True)
class TextTable:
    """
    Attributes:
        note: what a reader has to know, below the table.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""

    def as_markdown(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        table = f"## {self.title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"{table}\n\n{self.note}" if self.note else table


def short_names(names: Sequence[str]) -> list[str]:
    """The last part of each path, or the whole where two would be the same."""
    short = [Path(name).name or name for name in names]
    return short if len(set(short)) == len(set(names)) else list(names)


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


def controls_of(scores: Sequence[Score]) -> list[tuple[str, str]]:
    """(model, depth) of the models after the first that were measured at one depth."""
    depths: dict[str, list[str]] = {}
    for model, depth in dict.fromkeys((score.model, score.depth) for score in scores):
        depths.setdefault(model, []).append(depth)
    return [(model, of_model[0]) for model, of_model in list(depths.items())[1:] if len(of_model) == 1]


def depth_name(num_steps: int) -> str:
    """`r=4`; 0 stands for a model without a loop."""
    return f"r={num_steps}" if num_steps else NO_LOOP


def accuracy_tables(found: Sequence[TaskAccuracy]) -> list[TextTable]:
    """A table for each task: per cent right, with standard errors from 0.5 up, a row for each difficulty.

    The first model's depths come first, then what its adaptive exit makes of it, then the other models.
    """
    tables = []
    for task in dict.fromkeys(one.task for one in found):
        own = [one for one in found if one.task == task]
        first, names = own[0], short_names([one.model for one in own])
        beyond = bool(first.trained_most) and first.difficulties[-1] > first.trained_most
        header = ["difficulty", "answers", *map(depth_name, first.num_steps)]
        if first.exits is not None:
            header += ["exit step", "right at exit"]
        header += [
            f"{name} {depth_name(r)}" for name, one in zip(names[1:], own[1:], strict=True) for r in one.num_steps
        ]
        rows = []
        for number, difficulty in enumerate(first.difficulties):
            cells = _accuracies(first, number)
            if first.exits is not None:
                cells += [f"{first.exits.mean_steps[number]:.1f}", f"{100 * first.exits.accuracy[number]:.0f}"]
            cells += [cell for one in own[1:] for cell in _accuracies(one, number)]
            star = " *" if beyond and difficulty > first.trained_most else ""
            rows.append([f"{difficulty}{star}", str(first.answers[number]), *cells])
        notes = ["* more difficult than anything trained."] if beyond else []
        if first.exits is not None:
            ends = first.exits
            notes.append(
                f"Adaptive exit ({ends.criterion}, threshold {ends.threshold}, at most {ends.num_steps} steps): "
                f"{100 * ends.overall:.1f} % right against {100 * ends.overall_fixed:.1f} % at r = {ends.num_steps}; "
                f"Spearman of difficulty and steps {ends.spearman:.2f}."
            )
        tables.append(TextTable(f"{task}, per cent right by difficulty", header, rows, " ".join(notes)))
    return tables


def _accuracies(one: TaskAccuracy, number: int) -> list[str]:
    return [
        f"{100 * value:.0f}" + (f" ± {100 * error:.0f}" if error >= 0.005 else "")
        for value, error in zip(one.accuracy[number], one.standard_error[number], strict=True)
    ]


def score_tables(scores: Sequence[Score], differences: Sequence[Difference]) -> list[TextTable]:
    """A table for each task, a row for each metric, model and depth.

    The differences shown are paired: those from the first row of the same metric, and those of the first model from each
    other that was measured at one depth, such as a control.
    """
    found = []
    apart = {
        (one.task, one.metric, one.filter, one.model, one.depth, one.model_from, one.depth_from): one
        for one in differences
    }
    models = list(dict.fromkeys(score.model for score in scores))
    names = dict(zip(models, short_names(models), strict=True))
    several = len(models) > 1
    controls = controls_of(scores)

    def moved(score: Score, start: tuple[str, str], scale: float, digits: int) -> str:
        key = (score.task, score.metric, score.filter)
        one, sign = apart.get((*key, score.model, score.depth, *start)), 1
        if one is None:  # the pair may be kept the other way round
            one, sign = apart.get((*key, *start, score.model, score.depth)), -1
        if one is None:
            return ""
        return with_error(sign * scale * one.difference + 0.0, scale * one.standard_error, digits, True)

    for task in dict.fromkeys(score.task for score in scores):
        own = [score for score in scores if score.task == task]
        rows = []
        for metric, kind in dict.fromkeys((score.metric, score.filter) for score in own):
            alike = [score for score in own if (score.metric, score.filter) == (metric, kind)]
            first, scale, digits = alike[0], *((100, 1) if metric in SHARES else (1, 3))
            for score in alike:
                error = None if score.standard_error is None else scale * score.standard_error
                rows.append(
                    [
                        metric if kind == "none" else f"{metric}, {kind}",
                        *([names[score.model]] if several else []),
                        score.depth,
                        with_error(scale * score.value, error, digits),
                        moved(score, (first.model, first.depth), scale, digits),
                        *(moved(score, one, scale, digits) if score.model == first.model else "" for one in controls),
                        f"{score.mean_steps:.2f}" if score.mean_steps else "",
                        with_unit(score.flops_per_token),
                        with_unit(score.flops_per_answer),
                        with_unit(score.effective_parameters),
                    ]
                )
        header = ["metric", *(["model"] if several else []), "depth", "value", "from the first"]
        header += [f"from {names[model]}" for model, _ in controls]
        header += ["mean steps", "FLOPs/token", "FLOPs/answer", "effective parameters"]
        # Splits of a task may have different numbers of answers.
        counts = dict.fromkeys(str(score.answers) for score in own)
        of = "answers" if is_task(task) else "documents"
        found.append(TextTable(f"{task}, {' and '.join(counts)} {of}", header, rows))
    return found


def published_table(scores: Sequence[Score], published: PublishedTable, limit: int | None = None) -> TextTable | None:
    """Own rows above the published ones, a column for each task; None where none of these tasks was asked.

    Args:
        limit: documents of each task that were asked; None for all.
    """
    wanted = {(task, metric): place for place, (task, metric) in enumerate(published.metrics.items())}
    found: dict[tuple[str, str], dict[int, float]] = {}
    for score in scores:
        place = wanted.get((score.task, score.metric))
        if place is not None:
            found.setdefault((score.model, score.depth), {})[place] = 100 * score.value
    places = sorted({place for by_place in found.values() for place in by_place})
    if not places:
        return None
    tasks = list(published.metrics)
    names = short_names([model for model, _ in found])
    rows = [
        [name, depth, *(f"{by_place[place]:.2f}" if place in by_place else "" for place in places)]
        for name, ((_, depth), by_place) in zip(names, found.items(), strict=True)
    ]
    rows += [[row.model, row.depth, *(f"{row.per_cent[place]:.2f}" for place in places)] for row in published.rows]
    note = f"Published figures from {published.source}."
    if limit is not None:
        note += f" Own ones are of the first {limit} documents of each task, published ones of all."
    header = ["model", "depth", *(f"{tasks[place]}, {published.metrics[tasks[place]]}" for place in places)]
    return TextTable("Beside published figures, per cent", header, rows, note)


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
