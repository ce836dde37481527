"""Rows of task problems to train on: whole texts side by side, labels on their answers alone."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from redepth.errors import RedepthError

from .rows import Place
from .tasks import IGNORED, ArrayTask, Task, TextEncoder, open_task
from .tasks.protocol import TaskText

DRAWN_AT_ONCE = 32  # texts


@dataclass(frozen=True)
class TaskSettings:
    """What the rows of a task depend on beside the task and the tokenizer.

    Attributes:
        length: tokens in a row.
        questions: in each text.
        scratchpad: intermediate results are written out, with one question a text.
        num_results: how many steps get labels of their own.
        seed: of the problems.
    """

    length: int
    questions: int
    scratchpad: bool = False
    num_results: int = 1
    seed: int = 0


def hardest(task: Task) -> int | None:
    """The most difficult answers of the training split; None where a task does not tell."""
    return task.depth[1] if isinstance(task, ArrayTask) else None


def up_to(spec: str, difficulty: int | None) -> Task:
    """A task with nothing harder than `difficulty`.

    Raises:
        RedepthError: for a limit on a task that has no range of difficulties, or below the range.
    """
    task = open_task(spec)
    if difficulty is None:
        return task
    if not isinstance(task, ArrayTask):
        raise RedepthError(f"stages need a range of difficulties, which {spec!r} has not; leave stages out")
    if difficulty < task.depth[0]:
        raise RedepthError(
            f"a stage ends at difficulty {difficulty}, below depth={task.depth[0]}-{task.depth[1]} of {spec!r}"
        )
    return replace(task, depth=(task.depth[0], min(difficulty, task.depth[1])), harder=(0, 0))


class TaskRows:
    """One task's rows without end; as many whole texts in each as fit it, and filler behind them.

    A row has `input_ids` and `labels` (−100 off answers), `position_ids` that restart with each text, so that none sees
    another, and `difficulty` (−1 off answers), each `[length]`; and `step_labels` `[num_results, length]`, the intermediate
    results: entry i − 1 is the one after step i, and the last one stands for all that follow.
    """

    def __init__(self, task: Task, tokenizer: Any, settings: TaskSettings) -> None:
        self._task = task
        self._settings = settings
        self._encode = TextEncoder(tokenizer, settings.num_results)
        filler = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.pad_token_id
        self._filler = filler if filler is not None else 0

    def _draw(self, split: Any, count: int, seed: int) -> list[TaskText]:
        if self._settings.scratchpad:
            return self._task.scratchpads(split, count, seed)
        return self._task.texts(split, count, seed, self._settings.questions)

    def _texts(self, first: int) -> Iterator[dict[str, torch.Tensor]]:
        """The training texts from number `first` on, each as a row of its own length."""
        block = first // DRAWN_AT_ONCE
        while True:
            texts = self._draw("train", DRAWN_AT_ONCE, self._settings.seed * 1_000_003 + block)
            for text in texts[first - block * DRAWN_AT_ONCE :]:
                yield self._encoded(text)
            block += 1
            first = block * DRAWN_AT_ONCE

    def _encoded(self, text: TaskText) -> dict[str, torch.Tensor]:
        encoded = self._encode([text])
        tokens = encoded.ids.shape[1]
        if tokens > self._settings.length:
            raise RedepthError(
                f"a text of {self._task.spec!r} has {tokens} tokens, and a row {self._settings.length}; raise "
                "sequence_length, or ask fewer questions"
            )
        return {
            "input_ids": encoded.ids[0],
            "labels": encoded.labels[0],
            "position_ids": torch.arange(tokens),
            "difficulty": encoded.difficulty[0],
            "step_labels": encoded.step_labels[:, 0],
        }

    def _row(self, texts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        missing = self._settings.length - sum(len(text["input_ids"]) for text in texts)
        filler = {
            "input_ids": torch.full((missing,), self._filler),
            "labels": torch.full((missing,), IGNORED),
            "position_ids": torch.arange(missing),
            "difficulty": torch.full((missing,), -1),
            "step_labels": torch.full((self._settings.num_results, missing), IGNORED),
        }
        return {name: torch.cat([*(text[name] for text in texts), filler[name]], -1) for name in filler}

    def from_place(self, place: Place) -> Iterator[tuple[dict[str, torch.Tensor], Place]]:
        """Rows from the text that `place` numbers on, each with the place of the next one."""
        number, used = place.document, 0
        held: list[dict[str, torch.Tensor]] = []
        for text in self._texts(number):
            if used + len(text["input_ids"]) > self._settings.length:
                number += len(held)
                yield self._row(held), Place(0, number)
                held, used = [], 0
            held.append(text)
            used += len(text["input_ids"])

    def held_out(self, rows: int) -> dict[str, torch.Tensor]:
        """The first problems of the split `held-out`, one a row: `input_ids` and `labels`, `[rows, length]`."""
        found = [self._row([self._encoded(text)]) for text in self._draw("held-out", rows, self._settings.seed)]
        return {name: torch.stack([row[name] for row in found]) for name in ("input_ids", "labels")}
