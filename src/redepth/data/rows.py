"""Text for healing: read as streams, tokenised, packed into rows of equal length, mixed, and resumed at any row."""

import json
import random
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet
import torch
from datasets import Dataset, IterableDataset, load_dataset

from redepth.errors import RedepthError, first_line
from redepth.healing.recipe import DataSource, HealRecipe

from .python_docs import python_docs

PYTHON_DOCS = "python-docs"
BUILDERS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
LICENSE_COLUMN = "license"
SHUFFLE_BUFFER = 1000  # documents


class Place(NamedTuple):
    """Where in a source a row begins: pass over the source, document in that pass, token in that document."""

    epoch: int = 0
    document: int = 0
    token: int = 0


def open_text(spec: str, column: str = "text") -> IterableDataset:
    """A stream of documents, each with one key, `text`.

    Args:
        spec: `python-docs`, a .txt (one document), .jsonl or .parquet file, or a `datasets` id, with `:subset` where it
            has several.
        column: where jsonl, parquet and hub data keep the text.

    Raises:
        RedepthError: for a missing file, an unknown ending, or data without such a column.
    """
    if spec == PYTHON_DOCS:
        return Dataset.from_dict({"text": python_docs()}).to_iterable_dataset()
    file = Path(spec).expanduser()
    if file.suffix in BUILDERS:
        if not file.is_file():
            raise RedepthError(f"data file {spec!r} does not exist")
        builder = BUILDERS[file.suffix]
        options = {"sample_by": "document"} if builder == "text" else {}
        if not file.stat().st_size:
            raise RedepthError(f"data file {spec!r} is empty")
        try:
            stream = load_dataset(builder, data_files=str(file), split="train", streaming=True, **options)
        except Exception as error:  # datasets, pyarrow and json raise their own kinds
            raise RedepthError(f"data file {spec!r} can't be read: {first_line(error)}") from None
    elif file.exists():
        raise RedepthError(f"data {spec!r} is not one of {', '.join(BUILDERS)}; give such a file or a datasets id")
    else:
        try:
            name, _, subset = spec.partition(":")
            stream = load_dataset(name, subset or None, split="train", streaming=True)
        except Exception as error:  # datasets raises its own and the hub's kinds alike
            raise RedepthError(
                f"data {spec!r} is no local file and could not be loaded by datasets: {first_line(error)}"
            ) from None
    columns = stream.column_names or list(next(iter(stream), {}))
    if column not in columns:
        raise RedepthError(
            f"data {spec!r} has no column {column!r}, only {', '.join(columns)}; name it with --text-column"
        )
    return (
        stream.select_columns([column]).rename_column(column, "text")
        if column != "text"
        else stream.select_columns(["text"])
    )


def licenses_of(source: DataSource) -> dict[str, int | None]:
    """The licences of a source and how many documents are under each (None where that is not known)."""
    file = Path(source.data).expanduser()
    if source.data == PYTHON_DOCS:
        return {"psf-2.0": None}
    if file.suffix == ".parquet" and LICENSE_COLUMN in pyarrow.parquet.read_schema(file).names:
        column = pyarrow.parquet.read_table(file, columns=[LICENSE_COLUMN])[LICENSE_COLUMN].to_pylist()
    elif file.suffix == ".jsonl":
        with file.open(encoding="utf-8") as lines:
            column = [json.loads(line).get(LICENSE_COLUMN) for line in lines if line.strip()]
    else:
        column = []
    found = Counter(str(entry) for entry in column if entry is not None)
    return dict(found.most_common()) or {source.license or "not stated": None}


def encode(text: str, tokenizer: Any) -> list[int]:
    """A document's tokens, with the special ones that the model expects and closed by the end-of-text token."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    closed = tokenizer.eos_token_id is None or ids[-1:] == [tokenizer.eos_token_id]
    return ids if closed else [*ids, tokenizer.eos_token_id]


def rows_of(documents: Iterator[tuple[Place, list[int]]], length: int) -> Iterator[tuple[list[int], list[int], Place]]:
    """Rows of `length` tokens from documents laid end to end.

    Args:
        documents: (place, tokens); where the place's token is not 0, what comes before it is left out.

    Returns:
        tokens, their positions, counted from the start of the document or of the row, and where the next row begins.
    """
    held: deque[tuple[Place, list[int]]] = deque()
    in_hand = 0
    for place, document in documents:
        held.append((place, document))
        in_hand += len(document) - place.token
        while in_hand >= length:
            row: list[int] = []
            positions: list[int] = []
            following = Place()
            while len(row) < length:
                start, ids = held.popleft()
                taken = ids[start.token : start.token + length - len(row)]
                row += taken
                positions += range(len(taken))
                following = start._replace(token=start.token + len(taken))
                if following.token < len(ids):
                    held.appendleft((following, ids))
                else:
                    following = Place(start.epoch, start.document + 1)
            in_hand -= length
            yield row, positions, following


class SourceRows:
    """One source's rows without end, the documents reshuffled at each pass over them."""

    def __init__(self, stream: IterableDataset, name: str, tokenizer: Any, length: int, seed: int) -> None:
        self._stream = stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        self._name = name
        self._tokenizer = tokenizer
        self._length = length

    def _documents(self, place: Place) -> Iterator[tuple[Place, list[int]]]:
        epoch, first, token = place
        while True:
            self._stream.set_epoch(epoch)
            document = -1
            for document, content in enumerate(self._stream):
                # What was read before is passed over without tokenising it again.
                if document >= first:
                    yield Place(epoch, document, token), encode(content["text"], self._tokenizer)
                    token = 0
            if document < 0:
                raise RedepthError(f"data {self._name!r} has no documents to train on")
            epoch, first = epoch + 1, 0

    def from_place(self, place: Place) -> Iterator[tuple[list[int], list[int], Place]]:
        return rows_of(self._documents(place), self._length)


class TrainingRows(torch.utils.data.IterableDataset):
    """Training rows without end: sources mixed by weight, phase after phase.

    Gives `input_ids`, `labels` and, where documents are kept apart, `position_ids`, each `[sequence_length]`. A token
    that begins a document has no label, since nothing it may see foretells it. The order depends on the seed alone.
    """

    def __init__(self, recipe: HealRecipe, streams: dict[str, IterableDataset], tokenizer: Any) -> None:
        self._timetable = recipe.timetable()
        self._num_rows = recipe.max_steps * recipe.batch_size
        self._seed_of = recipe.seed_of
        self._separate = recipe.separate_documents
        self._sources = {
            name: SourceRows(stream, name, tokenizer, recipe.sequence_length, recipe.seed)
            for name, stream in streams.items()
        }
        self._places_at: dict[int, dict[str, Place]] = {0: dict.fromkeys(streams, Place())}
        self._start = 0
        # Loaders read ahead by less than a batch.
        self._remembered = 3 * recipe.batch_size

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


def held_out_rows(stream: IterableDataset, tokenizer: Any, length: int, rows: int) -> tuple[torch.Tensor, int]:
    """The stream's first rows, `[rows, length]`, and how many documents they take.

    Raises:
        RedepthError: for text too short to give a single row.
    """
    documents = ((Place(0, number), encode(content["text"], tokenizer)) for number, content in enumerate(stream))
    found = list(islice(rows_of(documents, length), rows))
    if not found:
        raise RedepthError(f"the held-out text is shorter than one row of {length} tokens; give more, or a shorter row")
    end = found[-1][2]
    return torch.tensor([ids for ids, _, _ in found]), end.document + (end.token > 0)


def held_out_text(tokenizer: Any, data: str, column: str, length: int, rows: int) -> torch.Tensor:
    """Rows `[rows, length]` of text to measure on: `data`'s first documents, or python-docs' held-out ones."""
    if data == PYTHON_DOCS:
        documents = Dataset.from_dict({"text": python_docs(held_out=True)}).to_iterable_dataset()
        return held_out_rows(documents, tokenizer, length, rows)[0]
    return held_out_rows(open_text(data, column), tokenizer, length, rows)[0]


def training_and_held_out(tokenizer: Any, recipe: HealRecipe) -> tuple[TrainingRows, torch.Tensor]:
    """Training rows without end, and held-out rows `[eval_rows, length]` from documents that training never sees.

    Without `validation`, every source gives its first documents, for as many of the held-out rows as the others.

    Raises:
        RedepthError: for data that can't be read, or that is used up by the held-out rows.
    """
    length = recipe.sequence_length
    sources = {source.data: source for _, phase in recipe.timetable() for source in phase}
    streams = {name: open_text(name, source.text_column or recipe.text_column) for name, source in sources.items()}
    held_out = []
    if recipe.validation is not None:
        held_out.append(held_out_text(tokenizer, recipe.validation, recipe.text_column, length, recipe.eval_rows))
    else:
        for number, name in enumerate(list(streams)[: recipe.eval_rows]):
            share = len(range(number, recipe.eval_rows, len(streams)))
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
    return TrainingRows(recipe, streams, tokenizer), torch.cat(held_out)
