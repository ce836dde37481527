"""Text for healing: read as a stream, tokenised, packed into rows of equal length."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset, load_dataset

from redepth.errors import RedepthError, first_line
from redepth.text import python_docs

PYTHON_DOCS = "python-docs"
BUILDERS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
SHUFFLE_BUFFER = 1000  # documents


def open_text(spec: str, column: str = "text") -> IterableDataset:
    """A stream of documents, each with one key, `text`.

    Args:
        spec: `python-docs`, a .txt (one document), .jsonl or .parquet file, or a `datasets` id.
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
        stream = load_dataset(builder, data_files=str(file), split="train", streaming=True, **options)
    elif file.exists():
        raise RedepthError(f"data {spec!r} is not one of {', '.join(BUILDERS)}; give such a file or a datasets id")
    else:
        try:
            stream = load_dataset(spec, split="train", streaming=True)
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


def rows_of(documents: Iterator[dict[str, Any]], tokenizer: Any, length: int) -> Iterator[list[int]]:
    """Rows of `length` tokens from documents laid end to end, each closed by the end-of-text token."""
    held: list[int] = []
    for document in documents:
        # With the special tokens that the model expects, such as Gemma's at the start.
        ids = tokenizer(document["text"], verbose=False)["input_ids"]
        closed = tokenizer.eos_token_id is None or ids[-1:] == [tokenizer.eos_token_id]
        held += ids if closed else [*ids, tokenizer.eos_token_id]
        while len(held) >= length:
            yield held[:length]
            held = held[length:]


class PackedText(torch.utils.data.IterableDataset):
    """Endless training rows, the documents reshuffled at each pass over them.

    Gives `input_ids` and `labels`, each `[sequence_length]`; the order depends on the seed alone.
    """

    def __init__(self, stream: IterableDataset, tokenizer: Any, length: int, seed: int) -> None:
        self.stream = stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        self.tokenizer = tokenizer
        self.length = length

    def _documents(self) -> Iterator[dict[str, Any]]:
        epoch = 0
        while True:
            self.stream.set_epoch(epoch)
            yield from self.stream
            epoch += 1

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for row in rows_of(self._documents(), self.tokenizer, self.length):
            ids = torch.tensor(row)
            yield {"input_ids": ids, "labels": ids}


def held_out_rows(stream: IterableDataset, tokenizer: Any, length: int, rows: int) -> tuple[torch.Tensor, int]:
    """The stream's first rows, `[rows, length]`, and how many documents they take.

    Raises:
        RedepthError: for text too short to give a single row.
    """
    used = 0

    def counted() -> Iterator[dict[str, Any]]:
        nonlocal used
        for document in stream:
            used += 1
            yield document

    found = list(islice(rows_of(counted(), tokenizer, length), rows))
    if not found:
        raise RedepthError(f"the held-out text is shorter than one row of {length} tokens; give more, or a shorter row")
    return torch.tensor(found), used


def training_and_held_out(
    tokenizer: Any, data: str, column: str, validation: str | None, length: int, rows: int, seed: int
) -> tuple[PackedText, torch.Tensor]:
    """Training rows without end, and held-out rows `[rows, length]` from documents that training never sees."""
    training = open_text(data, column)
    if validation is not None or data == PYTHON_DOCS:
        held_out = held_out_text(tokenizer, validation or data, column, length, rows)
    else:
        held_out, used = held_out_rows(training, tokenizer, length, rows)
        training = training.skip(used)
        if next(iter(training), None) is None:
            raise RedepthError(
                f"data {data!r} has no documents left for training; name held-out text with --validation"
            )
    return PackedText(training, tokenizer, length, seed), held_out


def held_out_text(tokenizer: Any, data: str, column: str, length: int, rows: int) -> torch.Tensor:
    """Rows `[rows, length]` of text to measure on: `data`'s first documents, or python-docs' held-out ones."""
    if data == PYTHON_DOCS:
        documents = Dataset.from_dict({"text": python_docs(held_out=True)}).to_iterable_dataset()
        return held_out_rows(documents, tokenizer, length, rows)[0]
    return held_out_rows(open_text(data, column), tokenizer, length, rows)[0]
