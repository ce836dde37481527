"""Text as it is stored: files and hub data opened as streams of documents, every mistake named by file and row."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
from datasets import Dataset, IterableDataset, load_dataset

from redepth.errors import RedepthError, first_line

from .python_docs import python_docs
from .source import PYTHON_DOCS

LICENSE_COLUMN = "license"


class Document(NamedTuple):
    text: str
    license: str | None


def _text_file(file: Path) -> Iterator[tuple[str, Any]]:
    """The whole file as one record."""
    try:
        yield "text", {"text": file.read_bytes().decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        raise RedepthError(f"data file {str(file)!r} is not UTF-8 at byte {error.start}; save it as UTF-8") from None


def _json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    yield where, json.loads(text)
            except UnicodeDecodeError:
                raise RedepthError(f"data file {str(file)!r}, {where}: not UTF-8; save the file as UTF-8") from None
            except (json.JSONDecodeError, RecursionError) as error:
                raise RedepthError(f"data file {str(file)!r}, {where}: not valid JSON, {first_line(error)}") from None


def _json_file(file: Path) -> Iterator[tuple[str, Any]]:
    """A list of records, or lines as in .jsonl."""
    try:
        content = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError):
        yield from _json_lines(file)  # which says what is wrong, and where
        return
    for number, record in enumerate(content if isinstance(content, list) else [content], 1):
        yield f"record {number}", record


def _parquet(file: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            # Without the first there is nothing to read, and the mistake names all that is there.
            wanted = [name for name in columns if name in names] if columns[0] in names else names
            for batch in table.iter_batches(batch_size=256, columns=wanted):
                for record in batch.to_pylist():
                    number += 1
                    yield f"row {number}", record
    except (pyarrow.ArrowException, OSError) as error:
        after = f" after row {number}" if number else ""
        raise RedepthError(f"data file {str(file)!r} can't be read{after}: {first_line(error)}") from None


# By ending: what gives (where in the file, record) from a file and the columns that are wanted.
READERS: dict[str, Callable[[Path, tuple[str, ...]], Iterator[tuple[str, Any]]]] = {
    ".txt": lambda file, columns: _text_file(file),
    ".md": lambda file, columns: _text_file(file),
    ".jsonl": lambda file, columns: _json_lines(file),
    ".json": lambda file, columns: _json_file(file),
    ".parquet": _parquet,
}
WHOLE_FILES = (".txt", ".md")


def data_file(spec: str) -> Path | None:
    """The local file that `spec` means, or None for python-docs and hub data.

    Raises:
        RedepthError: for a file that is missing or empty, or whose ending is unknown.
    """
    if spec == PYTHON_DOCS:
        return None
    file = Path(spec).expanduser()
    if file.suffix not in READERS:
        if file.exists():
            raise RedepthError(f"data {spec!r} is not one of {', '.join(READERS)}; give such a file or a datasets id")
        return None
    if not file.is_file():
        raise RedepthError(f"data file {spec!r} {'is a folder' if file.is_dir() else 'does not exist'}")
    try:
        if not file.stat().st_size:
            raise RedepthError(f"data file {spec!r} is empty")
        file.open("rb").close()
    except OSError as error:
        raise RedepthError(f"data file {spec!r} can't be read: {error.strerror or first_line(error)}") from None
    return file


def check_text(record: Any, column: str, where: str) -> str:
    """The text of a record.

    Raises:
        RedepthError: naming `where`, for a record that has no such column, or no proper text in it.
    """
    if not isinstance(record, dict):
        raise RedepthError(f"data {where}: a {type(record).__name__} instead of a table with the column {column!r}")
    if column not in record:
        raise RedepthError(
            f"data {where}: no column {column!r}, only {', '.join(map(str, record))}; name it with --text-column"
        )
    text = record[column]
    if not isinstance(text, str):
        kind = "null" if text is None else f"a {type(text).__name__}"
        raise RedepthError(f"data {where}: {column} is {kind}, not a text; leave the row out")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RedepthError(f"data {where}: {column} has half a surrogate pair at character {error.start}") from None
    return text


def read_documents(spec: str, column: str = "text") -> Iterator[Document]:
    """The documents of a local file, in order.

    Raises:
        RedepthError: naming the file and the row, for one that can't be read.
    """
    file = data_file(spec)
    assert file is not None
    column = "text" if file.suffix in WHOLE_FILES else column
    for where, record in READERS[file.suffix](file, (column, LICENSE_COLUMN)):
        text = check_text(record, column, f"file {spec!r}, {where}")
        stated = record.get(LICENSE_COLUMN)
        yield Document(text, None if stated is None else str(stated))


def _file_texts(spec: str, column: str) -> Iterator[dict[str, str]]:
    for document in read_documents(spec, column):
        yield {"text": document.text}


def _hub_texts(spec: str, column: str) -> Iterator[dict[str, str]]:
    name, _, subset = spec.partition(":")
    for number, record in enumerate(load_dataset(name, subset or None, split="train", streaming=True), 1):
        yield {"text": check_text(record, column, f"{spec!r}, row {number}")}


def open_text(spec: str, column: str = "text") -> IterableDataset:
    """A stream of documents, each with one key, `text`; each is checked when it is read.

    Args:
        spec: `python-docs`, a .txt (one document), .jsonl, .json or .parquet file, or a `datasets` id, with `:subset`
            where it has several.
        column: where jsonl, parquet and hub data keep the text.

    Raises:
        RedepthError: for a missing file, an unknown ending, or a first document that can't be read.
    """
    if spec == PYTHON_DOCS:
        return Dataset.from_dict({"text": python_docs()}).to_iterable_dataset()
    texts = _hub_texts if data_file(spec) is None else _file_texts
    try:
        first = next(texts(spec, column), None)
    except RedepthError:
        raise
    except Exception as error:  # datasets raises its own and the hub's kinds alike
        raise RedepthError(
            f"data {spec!r} is no local file and could not be loaded by datasets: {first_line(error)}"
        ) from None
    if first is None:
        raise RedepthError(f"data {spec!r} has no documents")
    return IterableDataset.from_generator(texts, gen_kwargs={"spec": spec, "column": column})
