"""Pointer chains followed to their end: which node does this one finally lead to?"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from redepth.errors import RedepthError

from .arrays import END, ArrayTask, Problems, pick_by_difficulty
from .words import letters


@dataclass(frozen=True)
class Roots(ArrayTask):
    """Nodes in chains, each with one link towards the end of its chain; the ends link to themselves.

    Difficulty is the distance to the end. After step i a question's result is the node i links on, and the end once it is
    reached, so more steps never hurt.

    Attributes:
        nodes: how many there are.
    """

    short_name: ClassVar[str] = "roots"
    depth: tuple[int, int] = (0, 6)
    nodes: int = 16

    def check(self) -> None:
        super().check()
        letters(self.nodes)
        longest = max(self.depth[1], self.harder[1])
        if self.nodes < longest + 3:
            raise RedepthError(
                f"option nodes={self.nodes} of 'roots' must be at least {longest + 3}, three above the depth"
            )

    def usual_harder(self) -> tuple[int, int]:
        return self.depth[1] + 1, min(2 * self.depth[1], self.nodes - 3)

    @property
    def answer_words(self) -> list[str]:
        return letters(self.nodes)

    @property
    def other_words(self) -> list[str]:
        names = letters(self.nodes)
        return [f"{child}>{parent}" for child in names for parent in names] + ["links:", END]

    @property
    def usual_questions(self) -> int:
        return self.nodes

    def draw(self, rng: np.random.Generator, count: int, least: int, most: int, questions: int) -> Problems:
        nodes, at = self.nodes, np.arange(self.nodes)
        # A random order is cut into chains of one length, drawn anew for each problem, so that there are always several
        # ends that a far node could lead to. What is left over is the last chain; a single node takes a second.
        length = rng.integers(least, most + 1, (2, count, 1)).max(0) + 1
        starts = at % length == 0
        single = (nodes % length[:, 0] == 1) & (length[:, 0] > 1)
        starts[single, nodes - 1] = False
        starts[single, nodes - 2] = True
        first = np.maximum.accumulate(np.where(starts, at, 0), 1)
        order = rng.random((count, nodes)).argsort(1)
        towards = np.take_along_axis(order, np.where(starts, at, at - 1), 1)
        parent, distance = np.empty_like(order), np.empty_like(order)
        np.put_along_axis(parent, order, towards, 1)
        np.put_along_axis(distance, order, at - first, 1)
        asked = pick_by_difficulty(rng, distance, least, most, questions)
        shown = rng.random((count, nodes)).argsort(1)
        arrays = {"parent": parent, "asked": asked, "shown": shown}
        return Problems(parent, np.take_along_axis(distance, asked, 1), arrays)

    def results(self, problems: Problems, num_steps: int) -> np.ndarray:
        found = [problems["asked"]]
        for _ in range(num_steps):
            found.append(np.take_along_axis(problems["parent"], found[-1], 1))
        return np.stack(found)

    def statement(self, problems: Problems) -> np.ndarray:
        shown = problems["shown"]
        edges = self.nodes + shown * self.nodes + np.take_along_axis(problems["parent"], shown, 1)
        start = np.full((len(problems), 1), self.nodes + self.nodes**2)
        return np.concatenate([start, edges], 1)

    def asked(self, problems: Problems) -> np.ndarray:
        return problems["asked"][..., None]

    def say_statement(self, problems: Problems, row: int) -> str:
        names, parent = letters(self.nodes), problems["parent"][row]
        return "links:" + ";".join(f" {names[child]} {names[parent[child]]}" for child in problems["shown"][row])

    def say_question(self, problems: Problems, row: int, question: int) -> str:
        return f"end {letters(self.nodes)[problems['asked'][row, question]]} ="

    def say(self, result: int) -> str:
        return " " + letters(self.nodes)[result]
