"""Training text: sources mixed by weight, phase after phase, and the held-out rows that training never sees."""

import random
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from datasets import IterableDataset

from redepth.errors import RedepthError

from .rows import Place, SourceRows, held_out_rows, held_out_text
from .source import PYTHON_DOCS, DataSource
from .task_rows import TaskRows, TaskSettings, hardest, up_to
from .tasks import is_task, open_task
from .text import open_text

UNKNOWN_DEPTH = 32  # results that a task without a range of difficulties may have


class TextSettings(Protocol):
    """What the text of a run depends on; a healing recipe has it all."""

    @property
    def sequence_length(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def max_steps(self) -> int: ...
    @property
    def separate_documents(self) -> bool: ...
    @property
    def validation(self) -> str | None: ...
    @property
    def text_column(self) -> str: ...
    @property
    def eval_rows(self) -> int: ...
    @property
    def questions(self) -> int: ...
    @property
    def seed(self) -> int: ...
    def stage_ends(self) -> list[tuple[float, int | None]]: ...
    def seed_of(self, number: int) -> int: ...
    def timetable(self) -> list[tuple[float, tuple[DataSource, ...]]]: ...


def columns_of(settings: TextSettings) -> dict[str, str]:
    """The run's sources, each with the column that holds its text.

    Raises:
        RedepthError: for a source that is named with two columns.
    """
    columns: dict[str, str] = {}
    for _, sources in settings.timetable():
        for source in sources:
            if is_task(source.data):
                continue
            column = source.text_column or settings.text_column
            if columns.setdefault(source.data, column) != column:
                raise RedepthError(
                    f"data {source.data!r} is named with two text columns, {columns[source.data]!r} and {column!r}; give "
                    "one of them as a file of its own"
                )
    return columns


def tasks_of(settings: TextSettings) -> dict[str, DataSource]:
    """The run's tasks by their specs.

    Raises:
        RedepthError: for a task that is named twice, with and without a scratchpad.
    """
    tasks: dict[str, DataSource] = {}
    for _, sources in settings.timetable():
        for source in sources:
            if is_task(source.data) and tasks.setdefault(source.data, source).scratchpad != source.scratchpad:
                raise RedepthError(f"data {source.data!r} is named with and without scratchpad; choose one")
    return tasks


def hardest_of(settings: TextSettings) -> int | None:
    """The most difficult answers of the run's tasks; None without tasks, or where one does not tell."""
    levels = [hardest(open_task(spec)) for spec in tasks_of(settings)]
    return max((level for level in levels if level is not None), default=None) if None not in levels else None


class TrainingRows(torch.utils.data.IterableDataset):
    """An endless stream of training rows: sources mixed by weight, phase after phase.

    Gives `input_ids`, `labels` and, where documents are kept apart, `position_ids`, each `[sequence_length]`. A token
    that begins a document has no label, since nothing that it can see predicts it. Where a task is among the sources,
    every
    row also has what `TaskRows` gives; text has difficulty −1, and at every step the same labels. The order depends on the
    seed alone.

    Attributes:
        held_out_labels: of the held-out rows, `[eval_rows, sequence_length]`, where those are of tasks.
    """

    def __init__(self, settings: TextSettings, streams: dict[str, IterableDataset], tokenizer: Any) -> None:
        self._timetable = settings.timetable()
        self._num_rows = settings.max_steps * settings.batch_size
        self._seed_of = settings.seed_of
        self._separate = settings.separate_documents
        self._stages = settings.stage_ends()
        self._num_results = 0
        self.held_out_labels: torch.Tensor | None = None
        tasks = tasks_of(settings)
        if tasks:
            self._num_results = max(hardest_of(settings) or UNKNOWN_DEPTH, 1)
        self._texts = {
            name: SourceRows(stream, name, tokenizer, settings.sequence_length, settings.seed)
            for name, stream in streams.items()
        }
        # A stage's problems are a source of their own.
        self._tasks = {
            (name, stage): TaskRows(
                up_to(name, difficulty),
                tokenizer,
                TaskSettings(
                    settings.sequence_length,
                    settings.questions,
                    source.scratchpad,
                    self._num_results,
                    settings.seed_of(stage),
                ),
            )
            for name, source in tasks.items()
            for stage, (_, difficulty) in enumerate(self._stages)
        }
        keys = [*streams, *(f"{name} {stage}" for name, stage in self._tasks)]
        self._places_at: dict[int, dict[str, Place]] = {0: dict.fromkeys(keys, Place())}
        self._start = 0
        # Loaders read ahead by less than a batch.
        self._remembered = 3 * settings.batch_size

    def position(self, row: int) -> dict[str, Any]:
        """What `go_to` needs to continue with `row`, one of the last few that were returned."""
        return {"row": row, "places": self._places_at[row]}

    def go_to(self, position: dict[str, Any]) -> None:
        self._start = position["row"]
        self._places_at = {self._start: {name: Place(*place) for name, place in position["places"].items()}}

    def _choose(self, row: int) -> str:
        share = row / self._num_rows
        sources: Sequence[DataSource] = next(
            (sources for end, sources in self._timetable if share < end - 1e-9), self._timetable[-1][1]
        )
        draw = random.Random(self._seed_of(row))
        return draw.choices(sources, [source.weight for source in sources])[0].data

    def _stage(self, row: int) -> int:
        share = row / self._num_rows
        ends = [end for end, _ in self._stages]
        return next((stage for stage, end in enumerate(ends) if share < end - 1e-9), len(ends) - 1)

    def _text_items(self, name: str, place: Place) -> Iterator[tuple[dict[str, torch.Tensor], Place]]:
        for ids, positions, following in self._texts[name].from_place(place):
            item = {"input_ids": torch.tensor(ids)}
            item["labels"] = item["input_ids"]
            if self._separate:
                item["position_ids"] = torch.tensor(positions)
                item["labels"] = item["labels"].masked_fill(item["position_ids"] == 0, -100)
            if self._tasks:
                item["difficulty"] = torch.full_like(item["input_ids"], -1)
                item["step_labels"] = item["labels"].expand(self._num_results, -1)
            yield item, following

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        row, places = self._start, self._places_at[self._start]
        items: dict[str, Iterator[tuple[dict[str, torch.Tensor], Place]]] = {}
        while True:
            name = self._choose(row)
            key = name if name in self._texts else f"{name} {self._stage(row)}"
            if key not in items:
                items[key] = (
                    self._text_items(name, places[key])
                    if name in self._texts
                    else self._tasks[name, self._stage(row)].from_place(places[key])
                )
            item, following = next(items[key])
            row, places = row + 1, places | {key: following}
            self._places_at[row] = places
            self._places_at.pop(row - self._remembered, None)
            yield item

    def held_out_problems(self) -> list[TaskRows]:
        """Each task's rows, at its full difficulty."""
        return [rows for (_, stage), rows in self._tasks.items() if stage == len(self._stages) - 1]


def training_and_held_out(tokenizer: Any, settings: TextSettings) -> tuple[TrainingRows, torch.Tensor]:
    """An endless stream of training rows, and held-out rows `[eval_rows, length]` from documents that training never sees.

    Without `validation`, every source of text gives its first documents, for as many of the held-out rows as the others.
    Where there is no text at all, the rows are held-out problems of the tasks, and their labels lie in the rows'
    `held_out_labels`.

    Raises:
        RedepthError: for data that can't be read, or that is used up by the held-out rows.
    """
    length = settings.sequence_length
    streams = {name: open_text(name, column) for name, column in columns_of(settings).items()}
    held_out = []
    if settings.validation is not None:
        held_out.append(held_out_text(tokenizer, settings.validation, settings.text_column, length, settings.eval_rows))
    else:
        for number, name in enumerate(list(streams)[: settings.eval_rows]):
            share = len(range(number, settings.eval_rows, len(streams)))
            if name == PYTHON_DOCS:
                held_out.append(held_out_text(tokenizer, name, "text", length, share))
                continue
            rows, used = held_out_rows(streams[name], tokenizer, length, share)
            held_out.append(rows)
            streams[name] = streams[name].skip(used)
            if next(iter(streams[name]), None) is None:
                raise RedepthError(
                    f"data {name!r} has no documents left for training; name held-out text with --validation"
                )
    training = TrainingRows(settings, streams, tokenizer)
    if not held_out:
        tasks = training.held_out_problems()[: settings.eval_rows]
        problems = [rows.held_out(len(range(at, settings.eval_rows, len(tasks)))) for at, rows in enumerate(tasks)]
        training.held_out_labels = torch.cat([problem["labels"] for problem in problems])
        held_out = [problem["input_ids"] for problem in problems]
    return training, torch.cat(held_out)
