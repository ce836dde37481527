"""A function applied over and over: f5 of G, where the function is a table."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from redepth.errors import RedepthError

from .arrays import END, ArrayTask, Problems
from .words import letters


@dataclass(frozen=True)
class Iterate(ArrayTask):
    """A shuffled table of a function on letters; "apply it exactly d times". (Shapiro 2026, recurrent-qwen-svgd.)

    Difficulty is d; the values on the way differ from each other, so that no short cycle helps. After step i the result
    is the function applied i times, and the answer from step d on.

    Attributes:
        nodes: how many letters there are.
    """

    short_name: ClassVar[str] = "iterate"
    nodes: int = 16

    def check(self) -> None:
        super().check()
        letters(self.nodes)
        longest = max(self.depth[1], self.harder[1])
        if self.nodes < longest + 1 or self.nodes < 2:
            raise RedepthError(
                f"option nodes={self.nodes} of 'iterate' must be at least {longest + 1}, one above the depth"
            )

    def usual_harder(self) -> tuple[int, int]:
        return self.depth[1] + 1, min(2 * self.depth[1], self.nodes - 1)

    @property
    def answer_words(self) -> list[str]:
        return letters(self.nodes)

    @property
    def other_words(self) -> list[str]:
        names = letters(self.nodes)
        pairs = [f"{one}>{other}" for one in names for other in names]
        return [*pairs, "f:", *(f"f{times}" for times in range(self.nodes)), END]

    @property
    def usual_questions(self) -> int:
        return self.nodes // 2

    def draw(self, rng: np.random.Generator, count: int, least: int, most: int, questions: int) -> Problems:
        nodes, rows = self.nodes, np.arange(count)
        # One orbit is long enough for the deepest question; everything else maps anywhere.
        function = rng.integers(0, nodes, (count, nodes))
        orbit = rng.random((count, nodes)).argsort(1)
        for at in range(most):
            function[rows, orbit[:, at]] = orbit[:, at + 1]
        # How often the function can be applied to each letter before a value comes back.
        seen = np.zeros((count, nodes, nodes), dtype=bool)
        value = np.broadcast_to(np.arange(nodes), (count, nodes))
        fresh, reach = np.ones((count, nodes), dtype=bool), np.zeros((count, nodes), dtype=int)
        np.put_along_axis(seen, value[..., None], True, 2)
        for _ in range(most):
            value = np.take_along_axis(function, value, 1)
            fresh &= ~np.take_along_axis(seen, value[..., None], 2)[..., 0]
            np.put_along_axis(seen, value[..., None], True, 2)
            reach += fresh
        times = rng.integers(least, most + 1, (count, questions))
        usable = reach[:, None] >= times[..., None]
        start = np.where(usable, rng.random((count, questions, nodes)), -1).argmax(2)
        arrays = {"function": function, "start": start, "times": times, "shown": rng.random((count, nodes)).argsort(1)}
        return Problems(function, times, arrays)

    def results(self, problems: Problems, num_steps: int) -> np.ndarray:
        found = [problems["start"]]
        for step in range(1, num_steps + 1):
            onwards = np.take_along_axis(problems["function"], found[-1], 1)
            found.append(np.where(step <= problems["times"], onwards, found[-1]))
        return np.stack(found)

    def statement(self, problems: Problems) -> np.ndarray:
        shown = problems["shown"]
        pairs = self.nodes + shown * self.nodes + np.take_along_axis(problems["function"], shown, 1)
        return np.concatenate([np.full((len(problems), 1), self.nodes + self.nodes**2), pairs], 1)

    def asked(self, problems: Problems) -> np.ndarray:
        first_count = self.nodes + self.nodes**2 + 1
        return np.stack([first_count + problems["times"], problems["start"]], 2)

    def say_statement(self, problems: Problems, row: int) -> str:
        names, function = letters(self.nodes), problems["function"][row]
        return "f:" + ";".join(f" {names[one]} {names[function[one]]}" for one in problems["shown"][row])

    def say_question(self, problems: Problems, row: int, question: int) -> str:
        start = letters(self.nodes)[problems["start"][row, question]]
        return f"f{problems['times'][row, question]} {start} ="

    def say(self, result: int) -> str:
        return " " + letters(self.nodes)[result]
