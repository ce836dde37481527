"""Chained assignments in code form: what is the value of this variable?"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from redepth.errors import RedepthError

from .arrays import END, ArrayTask, Problems, pick_by_difficulty
from .words import digits, letters


@dataclass(frozen=True)
class Variables(ArrayTask):
    """Lines such as `B=7` and `D=B+4`, each using what stands above it, modulo a number.

    Difficulty is how many assignments lie between a variable and its constant. After step i the result is the value as it
    is if a variable more than i assignments back counts as 0 — the sum of the last i + 1 constants — and the right one
    once the first assignment is among them. In compact ids a line is
    its value and where it goes, `=7 >B` and `B+4 >D`, and the second asks for its variable.

    Attributes:
        lines: how many assignments a problem has.
        modulus: values are from 0 to modulus − 1.
    """

    short_name: ClassVar[str] = "variables"
    depth: tuple[int, int] = (0, 8)
    lines: int = 16
    modulus: int = 10

    def check(self) -> None:
        super().check()
        letters(self.lines)
        longest = max(self.depth[1], self.harder[1])
        if self.lines < longest + 1:
            raise RedepthError(
                f"option lines={self.lines} of 'variables' must be at least {longest + 1}, one above the depth"
            )
        if not 2 <= self.modulus <= 10:
            raise RedepthError(
                f"option modulus={self.modulus} of 'variables' must be from 2 to 10, so that values are digits"
            )

    def usual_harder(self) -> tuple[int, int]:
        return self.depth[1] + 1, min(2 * self.depth[1], self.lines - 1)

    @property
    def answer_words(self) -> list[str]:
        return digits(self.modulus)

    @property
    def other_words(self) -> list[str]:
        names, constants = letters(self.lines), digits(self.modulus)
        sums = [f"{used}+{constant}" for used in names for constant in constants]
        return [*sums, *(f"={constant}" for constant in constants), *(f">{name}" for name in names), *names, END]

    @property
    def usual_questions(self) -> int:
        return self.lines

    def draw(self, rng: np.random.Generator, count: int, least: int, most: int, questions: int) -> Problems:
        lines = self.lines
        name = rng.random((count, lines)).argsort(1)
        # None is 0: no step leaves a result as it was before the last, so a result that stays is a right one.
        constant = rng.integers(1, self.modulus, (count, lines))
        eagerness, fresh = rng.random((count, 1)) * 2, rng.random((count, lines)) < 0.15
        source, distance = np.full((count, lines), -1), np.zeros((count, lines), dtype=int)
        for line in range(1, lines):
            chosen = pick_source(rng, distance[:, :line], most, eagerness)
            source[:, line] = np.where(fresh[:, line], -1, chosen)
            onwards = np.take_along_axis(distance, chosen[:, None], 1)[:, 0] + 1
            distance[:, line] = np.where(source[:, line] < 0, 0, onwards)
        asked = ask_lines(rng, distance, least, most, questions)
        arrays = {"name": name, "constant": constant, "source": source, "asked": asked}
        content = np.concatenate([name, constant, source + 1], 1)
        return Problems(content, np.take_along_axis(distance, asked, 1), arrays)

    def values(self, problems: Problems, num_steps: int) -> np.ndarray:
        """`[num_steps + 1, B, lines]`: every line's result after 0 … num_steps steps."""
        constant, source = problems["constant"], problems["source"]
        found = [constant]
        for _ in range(num_steps):
            known = np.where(source < 0, 0, np.take_along_axis(found[-1], np.maximum(source, 0), 1))
            found.append((known + constant) % self.modulus)
        return np.stack(found)

    def results(self, problems: Problems, num_steps: int) -> np.ndarray:
        asked = np.broadcast_to(problems["asked"], (num_steps + 1, *problems["asked"].shape))
        return np.take_along_axis(self.values(problems, num_steps), asked, 2)

    def statement(self, problems: Problems) -> np.ndarray:
        name, source, constant = problems["name"], problems["source"], problems["constant"]
        used = np.where(source < 0, self.lines, np.take_along_axis(name, np.maximum(source, 0), 1))
        value = self.modulus + used * self.modulus + constant
        return np.stack([value, self._first_target() + name], 2).reshape(len(problems), -1)

    def _first_target(self) -> int:
        return self.modulus * (self.lines + 2)

    def places_in_statement(self, problems: Problems) -> np.ndarray:
        return 2 * problems["asked"] + 1

    def asked(self, problems: Problems) -> np.ndarray:
        first_name = self._first_target() + self.lines
        return first_name + np.take_along_axis(problems["name"], problems["asked"], 1)[..., None]

    def scratchpad(self, problems: Problems) -> tuple[np.ndarray, np.ndarray]:
        """The values of the variables from the constant on to the one that is asked for."""
        most = int(problems.difficulty.max())
        right = self.values(problems, self.lines)[-1]
        at, back = problems["asked"], [problems["asked"]]
        for _ in range(most):
            at = np.where(
                np.take_along_axis(problems["source"], at, 1) < 0, at, np.take_along_axis(problems["source"], at, 1)
            )
            back.append(at)
        # Step `difficulty − place` back from the one that is asked for.
        steps_back = np.maximum(problems.difficulty[..., None] - np.arange(most + 1), 0)
        lines = np.take_along_axis(np.stack(back, 2), steps_back, 2)
        written = np.take_along_axis(right, lines.reshape(len(lines), -1), 1).reshape(lines.shape)
        return written, problems.difficulty + 1

    def say_statement(self, problems: Problems, row: int) -> str:
        names = [letters(self.lines)[name] for name in problems["name"][row]]
        said = []
        for name, source, constant in zip(names, problems["source"][row], problems["constant"][row], strict=True):
            said.append(f"{name}={constant}" if source < 0 else f"{name}={names[source]}+{constant}")
        return "\n".join([f"modulo {self.modulus}:", *said])

    def say_question(self, problems: Problems, row: int, question: int) -> str:
        return f"{letters(self.lines)[problems['name'][row, problems['asked'][row, question]]]} ->"

    def say(self, result: int) -> str:
        return str(result)


def pick_source(rng: np.random.Generator, distance: np.ndarray, most: int, eagerness: np.ndarray) -> np.ndarray:
    """For each problem one of the things so far, `[B]`, none so deep that the next would be deeper than `most`.

    Args:
        distance: `[B, things]`.
        eagerness: `[B, 1]`, from 0 (all alike) up (the deepest).
    """
    score = rng.random(distance.shape) + eagerness * distance / max(most, 1)
    return np.where(distance < most, score, -1.0).argmax(1)


def ask_lines(rng: np.random.Generator, difficulty: np.ndarray, least: int, most: int, questions: int) -> np.ndarray:
    """Every line in order where as many questions are asked, else `pick_by_difficulty`."""
    count, lines = difficulty.shape
    if questions == lines:
        return np.broadcast_to(np.arange(lines), (count, lines)).copy()
    return pick_by_difficulty(rng, difficulty, least, most, questions)
