"""Training text: sources mixed by weight, phase after phase, and the held-out rows that training never sees."""

import random
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from datasets import IterableDataset

from redepth.errors import RedepthError

from .rows import Place, SourceRows, held_out_rows, held_out_text
from .source import PYTHON_DOCS, DataSource
from .text import open_text


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
    def seed(self) -> int: ...
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
            column = source.text_column or settings.text_column
            if columns.setdefault(source.data, column) != column:
                raise RedepthError(
                    f"data {source.data!r} is named with two text columns, {columns[source.data]!r} and {column!r}; give "
                    "one of them as a file of its own"
                )
    return columns


class TrainingRows(torch.utils.data.IterableDataset):
    """Training rows without end: sources mixed by weight, phase after phase.

    Gives `input_ids`, `labels` and, where documents are kept apart, `position_ids`, each `[sequence_length]`. A token
    that begins a document has no label, since nothing it may see foretells it. The order depends on the seed alone.
    """

    def __init__(self, settings: TextSettings, streams: dict[str, IterableDataset], tokenizer: Any) -> None:
        self._timetable = settings.timetable()
        self._num_rows = settings.max_steps * settings.batch_size
        self._seed_of = settings.seed_of
        self._separate = settings.separate_documents
        self._sources = {
            name: SourceRows(stream, name, tokenizer, settings.sequence_length, settings.seed)
            for name, stream in streams.items()
        }
        self._places_at: dict[int, dict[str, Place]] = {0: dict.fromkeys(streams, Place())}
        self._start = 0
        # Loaders read ahead by less than a batch.
        self._remembered = 3 * settings.batch_size

    def position(self, row: int) -> dict[str, Any]:
        """What `go_to` needs to go on with `row`, one of the last few that were given out."""
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

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        row, places = self._start, self._places_at[self._start]
        rows: dict[str, Iterator[tuple[list[int], list[int], Place]]] = {}
        while True:
            name = self._choose(row)
            if name not in rows:
                rows[name] = self._sources[name].from_place(places[name])
            ids, positions, following = next(rows[name])
            row, places = row + 1, places | {name: following}
            self._places_at[row] = places
            self._places_at.pop(row - self._remembered, None)
            item = {"input_ids": torch.tensor(ids)}
            item["labels"] = item["input_ids"]
            if self._separate:
                item["position_ids"] = torch.tensor(positions)
                item["labels"] = item["labels"].masked_fill(item["position_ids"] == 0, -100)
            yield item


def training_and_held_out(tokenizer: Any, settings: TextSettings) -> tuple[TrainingRows, torch.Tensor]:
    """Training rows without end, and held-out rows `[eval_rows, length]` from documents that training never sees.

    Without `validation`, every source gives its first documents, for as many of the held-out rows as the others.

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
    return TrainingRows(settings, streams, tokenizer), torch.cat(held_out)
