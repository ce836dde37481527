"""The report: one HTML file that needs nothing beside it, and the pictures as files."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment
from markupsafe import Markup

from redepth.evaluation.tables import short_names

from . import plots
from .dynamics import ENDINGS, EndingTests
from .measure import Course
from .summary import joined_exits
from .texts import NOTHING

if TYPE_CHECKING:
    from .analyze import Analysis

REPORT_FILE = "report.html"
PICTURE_FOLDER = "pictures"
# The page shows the words of so many texts, so many tokens each; the tables hold all.
TEXTS_SHOWN, TOKENS_SHOWN = 4, 256
PREDICTIONS_SHOWN = 3


@dataclass(frozen=True)
class Picture:
    """A figure with its place in the report.

    Attributes:
        name: of its files, and of its anchor.
        caption: what there is to see, in a sentence or two.
    """

    name: str
    caption: str
    figure: Any


def draw_pictures(found: Sequence["Analysis"], tokenizer: Any) -> list[Picture]:
    """Every picture of a report; those of single tokens are of the first text of the first checkpoint."""
    looped = [one for one in found if one.courses]
    names = short_names([one.name for one in found])
    course = looped[0].courses[0]
    cut = f" The first {plots.MOST_TOKENS} tokens." if len(course.text.tokens) > plots.MOST_TOKENS else ""
    num_steps, asks = looped[0].figures["num_steps"], "right" in looped[0].figures

    def curves(figure: str) -> dict[str, Any]:
        lines = {name: one.figures[figure] for name, one in zip(names, found, strict=True) if figure in one.figures}
        return {name: values * num_steps if len(values) == 1 else values for name, values in lines.items()}

    predicted = course.predictions
    judged = course.judged.nonzero()[0]
    last_picks = [tokenizer.decode([int(token)]) for token in predicted.top[judged, -1, 0]]
    pictures = [
        Picture(
            "by-depth",
            "Means over all answers: how many are right, the loss on them, the share of predictions that are the last step's, "
            "and the entropy of the prediction."
            if asks
            else "Means over all tokens: the loss on what follows in the text, the share of tokens whose likeliest next "
            "token is the last step's, and the entropy of the prediction.",
            plots.plot_by_step(
                ({"right answers, share": curves("right")} if asks else {})
                | {
                    "loss, nats": curves("loss"),
                    "same pick as the last step": curves("agreement_with_last"),
                    "entropy, nats": curves("entropy"),
                }
            ),
        ),
        Picture(
            "convergence",
            "Each row is a token. Dark means close: on the left to where the state ends, on the right to the state one step "
            f"on. A row that stays light on the right never comes to rest.{cut}",
            plots.plot_convergence(course.to_last, course.to_next, course.text.tokens),
        ),
        Picture(
            "trajectories",
            "Each token's course in its own two principal components, from the ring to the full dot, coloured by what it ends "
            "in; beside the token, how much of its movement the plane shows.",
            plots.plot_trajectories(
                course.plane, course.endings.names.tolist(), course.text.tokens, share=course.plane_share
            ),
        ),
        Picture(
            "predictions",
            "What coda and head would say after each step; a dot is where the likeliest next token changes. On the left, the "
            f"token and what the last step predicts after it.{' Where an answer is asked for.' if asks else cut}",
            plots.plot_predictions(
                predicted.entropy[judged],
                predicted.kl_to_last[judged],
                predicted.flips[judged],
                last_picks,
                [course.text.tokens[place] for place in judged],
            ),
        ),
        Picture(
            "exits",
            "After which step each exit test, at its default threshold, would let tokens go; dashed, the mean.",
            plots.plot_exits(joined_exits(looped[0].courses), num_steps),
        ),
        Picture(
            "starts",
            "Runs from zeros, from the embedded input and from noise: how far apart they are after each step. A line that "
            "falls to the precision of the numbers means that the end does not depend on the start.",
            plots.plot_spread(
                [np.concatenate([course.spread for course in one.courses]) for one in looped],
                [name for name, one in zip(names, found, strict=True) if one.courses],
            ),
        ),
    ]
    if course.attention_layers:
        shown = sorted({0, len(course.attention_layers) // 2, len(course.attention_layers) - 1})
        pictures.append(
            Picture(
                "attention",
                "What the text's last token reads at every step, averaged over heads, in the first, middle and last layer of "
                f"the core.{cut}",
                plots.plot_attention(
                    course.attention[shown], course.text.tokens, [course.attention_layers[place] for place in shown]
                ),
            )
        )
    return pictures


def _shown_text(course: Course, tokenizer: Any) -> list[dict[str, Any]]:
    """What the page knows of each token: its words, how it ends, and what each step would say next."""
    words: dict[int, str] = {}

    def word(token: int) -> str:
        return words.setdefault(token, tokenizer.decode([token]))

    predicted = course.predictions
    shown = []
    for place, token in enumerate(course.text.tokens[:TOKENS_SHOWN]):
        steps = [
            [[word(int(one)), round(float(p), 4)] for one, p in zip(ids, probabilities, strict=True)]
            for ids, probabilities in zip(
                predicted.top[place, :, :PREDICTIONS_SHOWN],
                predicted.probability[place, :, :PREDICTIONS_SHOWN],
                strict=True,
            )
        ]
        shown.append(
            {
                "token": token,
                "target": word(int(course.targets[place])) if course.targets[place] != NOTHING else None,
                "ending": str(course.endings.names[place]),
                "settled": int(course.settled[place]),
                "final": int(predicted.final_from[place]),
                "steps": steps,
            }
        )
    return shown


def write_report(folder: Path, found: Sequence["Analysis"], tokenizer: Any, made_by: dict[str, str]) -> None:
    """Write `report.html` and `pictures/` into a folder."""
    pictures = draw_pictures(found, tokenizer)
    (folder / PICTURE_FOLDER).mkdir()
    for picture in pictures:
        plots.save_picture(picture.figure, folder / PICTURE_FOLDER / picture.name)
    tests = EndingTests()
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    page = template.render(
        found=found,
        names=short_names([one.name for one in found]),
        figures=found[0].figures,
        endings=ENDINGS,
        tests=tests,
        colours=plots.ENDING_COLOURS,
        pictures={
            picture.name: {
                "caption": picture.caption,
                "svg": Markup(plots.inline_svg(picture.figure, picture.name)),
            }
            for picture in pictures
        },
        asks="right" in found[0].figures,
        texts=[_shown_text(course, tokenizer) for course in found[0].courses[:TEXTS_SHOWN]],
        texts_left=max(len(found[0].courses) - TEXTS_SHOWN, 0),
        tokens_shown=TOKENS_SHOWN,
        made_by=made_by,
    )
    (folder / REPORT_FILE).write_text(page, encoding="utf-8")
