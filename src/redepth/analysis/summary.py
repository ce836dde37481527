"""What the measures of some texts come to: figures, a verdict in words, and tables with documented columns."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from .contraction import Stretch
from .dynamics import ENDINGS, FIXED_POINT, SETTLED
from .measure import Course
from .texts import NOTHING

# "Settles after k steps": by then this share of the tokens that settle have.
MOST = 0.9
# Runs from different starts whose spread is below this share of the state's length end in one place.
SAME_PLACE = 0.01
# A loss this much above the lowest is worse, in nats.
WORSE = 0.005

TOKEN_COLUMNS = {
    "text": "number of the text, from 0",
    "place": "the token's place in its text, from 0",
    "token_id": "its id",
    "token": "its text",
    "target": "id of the token that should be foretold: the next one, or a task's answer; empty where none",
    "difficulty": "of the answer to a task that is foretold; empty elsewhere",
    "ending": f"what its trajectory ends in: {', '.join(ENDINGS)}",
    "period": "steps of an orbit's round, 0 for other endings",
    "settled_after": f"step from which on the state stays within {SETTLED:.0%} of its last value",
    "final_from": "step from which on the likeliest next token is the last step's",
    "extent": "test of a fixed point: root mean squared distance of the tail from its mean, relative to the mean's length",
    "shrink": "test of a fixed point: movement in the tail's second half relative to its first",
    "line": "test of a slider: share of the tail's variance that a straight course at even speed explains",
    "back": "test of an orbit: smallest mean squared distance of states p apart relative to states fewer apart",
}
STEP_COLUMNS = {
    "text": TOKEN_COLUMNS["text"],
    "place": TOKEN_COLUMNS["place"],
    "step": "number of steps run, 0 for the initial state",
    "log10_to_last": "log10 ‖s_i − s_R‖ / ‖s_R‖",
    "log10_to_next": "log10 ‖s_{i+1} − s_i‖ / ‖s_{i+1}‖; empty at the last step",
    "plane_x": "the state in the first principal component of the token's own trajectory",
    "plane_y": "and in the second",
    "log10_spread": "log10 of the spread over initial states, relative to the mean state's length",
    "entropy": "of the next-token distribution, in nats; empty at step 0, as what follows",
    "kl_to_last": "KL(p_R ‖ p_i) in nats",
    "loss": "−log p of the token that should be foretold, in nats; empty where none",
    "top_ids": "ids of the likeliest next tokens, likeliest first",
    "top_probabilities": "their probabilities",
}
ATTENTION_COLUMNS = {
    "text": TOKEN_COLUMNS["text"],
    "layer": "the core layer, counted over the whole stack from 0",
    "step": "step, from 1",
    "place": "the token that is read",
    "probability": "with which the text's last token reads it, averaged over heads",
}


def exit_column(test: str) -> str:
    """The column of `tokens` that holds an exit test's steps."""
    return f"exit_{test.replace('-', '_')}"


def _table(columns: dict[str, Any], said: dict[str, str]) -> pa.Table:
    table = pa.table(columns)
    fields = [
        field.with_metadata({"description": said.get(field.name, "step after which this exit test lets the token go")})
        for field in table.schema
    ]
    return table.cast(pa.schema(fields))


def make_tables(courses: Sequence[Course]) -> dict[str, pa.Table]:
    """`tokens`, `steps` and `attention`; each column's meaning is in the field's metadata."""
    tokens: dict[str, list[Any]] = {name: [] for name in TOKEN_COLUMNS}
    for name in courses[0].predictions.exits:
        tokens[exit_column(name)] = []
    steps: dict[str, list[Any]] = {name: [] for name in STEP_COLUMNS}
    attention: dict[str, list[Any]] = {name: [] for name in ATTENTION_COLUMNS}
    for number, course in enumerate(courses):
        count, seen = course.to_last.shape
        added = {
            "text": np.full(count, number),
            "place": np.arange(count),
            "token_id": course.text.ids,
            "token": course.text.tokens,
            "target": _without_nothing(course.text.targets),
            "difficulty": _without_nothing(course.text.difficulty or [NOTHING] * count),
            "ending": course.endings.names.tolist(),
            "period": course.endings.period,
            "settled_after": course.settled,
            "final_from": course.predictions.final_from,
            "extent": course.endings.extent,
            "shrink": course.endings.shrink,
            "line": course.endings.line,
            "back": course.endings.back,
        } | {exit_column(name): taken for name, taken in course.predictions.exits.items()}
        for name, values in added.items():
            tokens[name].extend(values)
        predicted = course.predictions
        wide = {
            "text": np.full((count, seen), number),
            "place": np.arange(count)[:, None].repeat(seen, 1),
            "step": np.arange(seen)[None].repeat(count, 0),
            "log10_to_last": course.to_last,
            "log10_to_next": np.pad(course.to_next, ((0, 0), (0, 1)), constant_values=np.nan),
            "plane_x": course.plane[..., 0],
            "plane_y": course.plane[..., 1],
            "log10_spread": course.spread,
        } | {
            name: np.pad(values, ((0, 0), (1, 0)), constant_values=np.nan)
            for name, values in (
                ("entropy", predicted.entropy),
                ("kl_to_last", predicted.kl_to_last),
                ("loss", predicted.loss),
            )
        }
        for name, grid in wide.items():
            whole = name in ("text", "place", "step")
            steps[name].extend(grid.ravel().tolist() if whole else _without_nan(grid))
        for name, values in (("top_ids", predicted.top), ("top_probabilities", predicted.probability)):
            for of_token in values:
                steps[name].extend([None, *of_token.tolist()])
        for layer, maps in zip(course.attention_layers, course.attention, strict=True):
            for step, reads in enumerate(maps, 1):
                attention["text"].extend([number] * count)
                attention["layer"].extend([layer] * count)
                attention["step"].extend([step] * count)
                attention["place"].extend(range(count))
                attention["probability"].extend(reads.tolist())
    tables = {"tokens": _table(tokens, TOKEN_COLUMNS), "steps": _table(steps, STEP_COLUMNS)}
    if attention["text"]:
        tables["attention"] = _table(attention, ATTENTION_COLUMNS)
    return tables


def _without_nothing(values: Sequence[int]) -> list[int | None]:
    return [None if value == NOTHING else value for value in values]


def _without_nan(grid: Any) -> list[float | None]:
    return [None if np.isnan(value) else value for value in grid.ravel().tolist()]


def joined_exits(courses: Sequence[Course]) -> dict[str, Any]:
    """By exit test, the step after which it lets each token go whose prediction counts."""
    names = courses[0].predictions.exits
    return {
        name: np.concatenate([course.predictions.exits[name][course.judged] for course in courses]) for name in names
    }


def summarise(courses: Sequence[Course], stretches: dict[int, Stretch], num_steps: int) -> dict[str, Any]:
    """The figures that the verdict is made of; lists are by number of steps, from 1.

    Those of predictions are of a task's answers where there are some, of all tokens otherwise.
    """
    endings = np.concatenate([course.endings.names for course in courses])
    settled = np.concatenate([course.settled for course in courses])
    final_from = np.concatenate([course.predictions.final_from[course.judged] for course in courses])
    losses = np.concatenate([course.predictions.loss[course.targets != NOTHING] for course in courses])
    picks = np.concatenate([course.predictions.top[course.judged, :, 0] for course in courses])
    spread = np.concatenate([course.spread for course in courses])
    moved = np.concatenate([course.to_next for course in courses])
    at_rest = settled[endings == FIXED_POINT]
    loss = losses.mean(0)
    lowest = int(next(step for step, value in enumerate(loss, 1) if value <= loss.min() + WORSE))
    answers = {}
    if courses[0].text.difficulty is not None:
        right = np.concatenate([course.right[course.judged] for course in courses])
        answers = {"answers": len(right), "right": [round(float(share), 4) for share in right.mean(0)]}
    return answers | {
        "texts": len(courses),
        "tokens": len(endings),
        "num_steps": num_steps,
        "endings": {name: round(float((endings == name).mean()), 4) for name in ENDINGS},
        "settled_after": int(np.quantile(at_rest, MOST, method="higher")) if len(at_rest) else None,
        "last_change_of_a_prediction": int(final_from.max()),
        "most_predictions_final_from": int(np.quantile(final_from, MOST, method="higher")),
        "best_num_steps": lowest,
        "loss": [round(float(value), 5) for value in loss],
        "agreement_with_last": [round(float(value), 4) for value in (picks == picks[:, -1:]).mean(0)],
        "entropy": [
            round(float(value), 5)
            for value in np.concatenate([course.predictions.entropy[course.judged] for course in courses]).mean(0)
        ],
        "log10_moved": [round(float(value), 4) for value in np.median(moved, axis=0)],
        "mean_exit_steps": {name: round(float(taken.mean()), 2) for name, taken in joined_exits(courses).items()},
        "spread": {
            "first": round(float(10 ** np.median(spread[:, 0])), 6),
            "last": round(float(10 ** np.median(spread[:, -1])), 6),
        },
        "stretch": {
            step: {"largest_singular_value": round(found.largest, 4), "converged": found.converged}
            for step, found in stretches.items()
        },
    }


def verdict(figures: dict[str, Any]) -> str:
    """One paragraph, every clause worked out from `summarise`'s figures."""
    deep = figures["num_steps"]
    shares = figures["endings"]
    said = []
    if figures["settled_after"] is not None:
        said.append(
            f"{shares[FIXED_POINT]:.0%} of {figures['tokens']} tokens settle in a fixed point, {MOST:.0%} of them "
            f"{_within(figures['settled_after'])}"
        )
    else:
        said.append(f"No token of {figures['tokens']} settles in a fixed point")
    verbs = {"orbit": "orbit", "slider": "slide on along a line", "drifting": "drift"}
    others = [f"{shares[name]:.0%} {verb}" for name, verb in verbs.items() if shares[name] > 0]
    text = _answers_in_words(figures) if "right" in figures else ""
    text += "; ".join([*said, *others]) + ". "
    last, most = figures["last_change_of_a_prediction"], figures["most_predictions_final_from"]
    if last < deep:
        text += f"Depth beyond {last} changes no prediction"
        text += f", and beyond {most} hardly one in ten. " if most < last else ". "
    else:
        text += f"Predictions still change at the last step, {deep}; {MOST:.0%} are final from step {most} on. "
    text += _loss_in_words(figures) if "right" not in figures else ""
    spread = figures["spread"]["last"]
    if spread < SAME_PLACE:
        text += "Where the state ends does not depend on where it starts"
    else:
        text += "Where the state ends depends on where it starts"
    apart = f"{spread:.2%}" if spread >= 0.0001 else "less than 0.01%"
    text += f" (runs from different initial states are {apart} of the state's length apart at the end)."
    return text


def _answers_in_words(figures: dict[str, Any]) -> str:
    right, deep = figures["right"], figures["num_steps"]
    best = right.index(max(right)) + 1
    text = f"Of {figures['answers']} answers {right[0]:.0%} are right at r = 1"
    if best == 1:
        return f"{text}, and no depth does better. "
    text += f", {right[best - 1]:.0%} at r = {best}"
    if best == deep:
        return f"{text}. "
    return f"{text} and {right[-1]:.0%} at {deep}. "


def _loss_in_words(figures: dict[str, Any]) -> str:
    deep, loss, best = figures["num_steps"], figures["loss"], figures["best_num_steps"]
    if best == deep:
        return f"The loss falls to the last step: {loss[0]:.3f} nats at r = 1, {loss[-1]:.3f} at {deep}. "
    if loss[-1] > loss[best - 1] + WORSE:
        return (
            f"The loss is as low as it gets at r = {best} ({loss[best - 1]:.3f} nats), and {loss[-1]:.3f} at {deep}. "
        )
    if best == 1:
        return f"The loss is {loss[0]:.3f} nats at r = 1, and no depth lowers it. "
    return f"The loss falls from {loss[0]:.3f} nats at r = 1 to {loss[best - 1]:.3f} at {best} and stays there. "


def _within(steps: int) -> str:
    return "before the first step" if steps == 0 else f"within {steps} step{'s' if steps > 1 else ''}"
