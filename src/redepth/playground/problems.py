"""Reasoning problems to try, with their answers: those that a small model was trained on, or any in words."""

import random
from dataclasses import dataclass, replace
from typing import Any

from redepth.data.tasks import TASKS, ArrayTask, is_import_path, open_task
from redepth.errors import RedepthError
from redepth.evaluation.problems import recorded_task

HARDEST = 12
DRAWN = 16  # problems to choose from; not every one is as difficult as asked for


@dataclass(frozen=True)
class Example:
    """One problem.

    Attributes:
        right: what the answer should be.
        new_tokens: how many tokens an answer needs at the most.
    """

    prompt: str
    right: str
    difficulty: int
    new_tokens: int


def trained_task(checkpoint: str) -> ArrayTask | None:
    """The task whose words are all that a small model knows; None for a model of text."""
    spec = recorded_task(checkpoint)
    # What a checkpoint says must not decide what code runs.
    task: Any = open_task(spec) if spec is not None and not is_import_path(spec) else None
    return task if isinstance(task, ArrayTask) else None


def task_names(own: ArrayTask | None) -> list[str]:
    return [own.name()] if own is not None else list(TASKS)


def make_example(name: str, difficulty: int, own: ArrayTask | None = None, seed: int | None = None) -> Example:
    """A problem that training never met, of this difficulty, or near it where the task has hardly any.

    Args:
        name: of `task_names(own)`.
        own: the task of a model that knows no other words; its problems come in them.
        seed: of the problem; another one each time by default.

    Raises:
        RedepthError: for a difficulty that the task has no problem of.
    """
    drawn = random.randrange(2**31) if seed is None else seed
    depth = (difficulty, difficulty)
    if own is not None:
        task = replace(own, questions=1)
        batch = task.batch("held-out", DRAWN, drawn, depth=depth)
        row = nearest(batch.difficulty[:, 0].tolist(), difficulty)
        prompt = " ".join(task.words[number] for number in batch.ids[row, : int(batch.places[row, 0]) + 1].tolist())
        return Example(prompt, task.words[int(batch.labels[row, 0])], int(batch.difficulty[row, 0]), 1)
    if name not in TASKS:
        raise RedepthError(f"task {name!r} is unknown; use {', '.join(TASKS)}")
    chosen: Any = TASKS[name]
    texts = chosen(depth=depth).texts("held-out", DRAWN, drawn)
    text = texts[nearest([each.answers[0].difficulty for each in texts], difficulty)]
    answer = text.answers[0]
    return Example(text.text[: answer.start], answer.right.strip(), answer.difficulty, 8)


def nearest(difficulties: list[int], wanted: int) -> int:
    """The first that is as difficult as wanted, or nearest to it."""
    return min(range(len(difficulties)), key=lambda number: abs(difficulties[number] - wanted))


def is_right(said: str, right: str) -> bool:
    """Whether what was said begins with the right answer, and with that word alone."""
    given, wanted = said.strip(), right.strip()
    after = given[len(wanted) : len(wanted) + 1]
    return given.startswith(wanted) and not (after.isalnum() or after == "_")
