"""Text in the colours of the steps that its tokens took."""

from typing import Any

from rich.text import Text

# From few steps to many.
COLOURS = ("bright_black", "blue", "cyan", "green", "yellow", "bright_red", "bold magenta")


def _colour(steps: int, most: int) -> str:
    return COLOURS[(steps - 1) * (len(COLOURS) - 1) // max(most - 1, 1)]


def coloured(tokenizer: Any, ids: list[int], steps: list[int]) -> Text:
    """The text, each token in the colour of its steps; a token that ends no character shows with the next."""
    text, done = Text(), ""
    for end, taken in enumerate(steps, 1):
        whole = tokenizer.decode(ids[:end], skip_special_tokens=True)
        if not whole.endswith("\ufffd"):
            text.append(whole[len(done) :], style=_colour(taken, max(steps)))
            done = whole
    return text


def legend(most: int) -> Text:
    """Which colour stands for which steps."""
    said, ends = Text("steps: "), {_colour(step, most): step for step in range(1, most + 1)}
    first = 1
    for colour, last in ends.items():
        said.append(f"{first}–{last} " if last > first else f"{last} ", style=colour)
        first = last + 1
    return said
