"""Tokens as HTML, each shaded by the steps it took, and the legend that says which shade means what."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# From few steps to many, light to dark, so that lightness alone tells them apart: for the colour-blind, and in grey.
SHADES = ("#fdf3c7", "#f3dc8c", "#d3c778", "#93b08f", "#5a93a8", "#2f6690", "#173f5f")
INK_ON_LIGHT, INK_ON_DARK = "#1a1a1a", "#ffffff"
FIRST_DARK = 5  # the first shade that needs light letters


@dataclass(frozen=True)
class Unit:
    """A piece of an answer that is shown as one: a token, or the few that make a character together.

    Attributes:
        place: of its last token among the answer's tokens.
        steps: of each of its tokens.
    """

    text: str
    place: int
    steps: tuple[int, ...]


def shade_of(steps: int, most: int) -> int:
    """Which of SHADES stands for so many steps where `most` is the deepest."""
    return min((steps - 1) * (len(SHADES) - 1) // max(most - 1, 1), len(SHADES) - 1)


def style_sheet() -> str:
    """The shades as classes."""
    return "\n".join(
        f".rd-{number} {{ background: {shade}; color: {INK_ON_DARK if number >= FIRST_DARK else INK_ON_LIGHT}; }}"
        for number, shade in enumerate(SHADES)
    )


def _steps_in_words(steps: Sequence[int]) -> str:
    said = " + ".join(map(str, steps))
    return f"{said} step" if said == "1" else f"{said} steps"


def answer_html(units: Sequence[Unit], most: int, label: str) -> str:
    """An answer's tokens; they can be hovered, tapped, and walked through with the arrow keys.

    Args:
        most: the deepest that the shades reach.
        label: what a screen reader calls the answer.
    """
    shown = []
    for number, unit in enumerate(units):
        ends = not unit.text
        text = "■" if ends else escape(unit.text).replace("\n", "↵\n")
        words = _steps_in_words(unit.steps)
        said = f"end of the answer, {words}" if ends else f"{unit.text.strip() or 'white space'}, {words}"
        shown.append(
            f'<span class="rd-token rd-{shade_of(max(unit.steps), most)}" role="button" tabindex="{-1 if number else 0}" '
            f'data-place="{unit.place}" data-steps="{words}" aria-label="{escape(said, quote=True)}">{text}</span>'
        )
    return f'<div class="rd-answer" role="group" aria-label="{escape(label, quote=True)}">{"".join(shown)}</div>'


def legend_html(most: int) -> str:
    """Which steps each shade stands for."""
    ranges: dict[int, list[int]] = {}
    for steps in range(1, most + 1):
        ranges.setdefault(shade_of(steps, most), []).append(steps)
    shown = [
        f'<span class="rd-swatch rd-{shade}">{taken[0]}{f"–{taken[-1]}" if len(taken) > 1 else ""}</span>'
        for shade, taken in ranges.items()
    ]
    return f'<div class="rd-legend"><span>Steps a token took</span>{"".join(shown)}</div>'
