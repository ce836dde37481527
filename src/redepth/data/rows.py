"""Documents tokenised and laid end to end into rows of equal length, resumed at any row."""

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from datasets import Dataset, IterableDataset

from redepth.errors import RedepthError

from .python_docs import python_docs
from .source import PYTHON_DOCS
from .text import open_text

SHUFFLE_BUFFER = 1000  # documents


class Place(NamedTuple):
    """Where a row begins in a source: the pass over the source, the document in that pass, the token in that document."""

    epoch: int = 0
    document: int = 0
    token: int = 0


def encode(text: str, tokenizer: Any) -> list[int]:
    """A document's tokens, with the special ones that the model expects and closed by the end-of-text token."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    closed = tokenizer.eos_token_id is None or ids[-1:] == [tokenizer.eos_token_id]
    return ids if closed else [*ids, tokenizer.eos_token_id]


def rows_of(documents: Iterator[tuple[Place, list[int]]], length: int) -> Iterator[tuple[list[int], list[int], Place]]:
    """Rows of `length` tokens from documents laid end to end.

    Args:
        documents: (place, tokens); where the place's token is not 0, the tokens before it are skipped.

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
    """An endless stream of one source's rows, the documents reshuffled at each pass."""

    def __init__(self, stream: IterableDataset, name: str, tokenizer: Any, length: int, seed: int) -> None:
        self._stream = stream.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
        self._name = name
        self._tokenizer = tokenizer
        self._length = length

    def _documents(self, place: Place) -> Iterator[tuple[Place, list[int]]]:
        epoch, first, token = place
        while True:
            self._stream.set_epoch(epoch)
            documents = tokens = 0
            for document, content in enumerate(self._stream):
                documents += 1
                # What was read before is skipped without tokenising it again.
                if document >= first:
                    ids = encode(content["text"], self._tokenizer)
                    yield Place(epoch, document, token), ids
                    tokens += len(ids)
                    token = 0
            if not documents or not (first or tokens):
                raise RedepthError(f"data {self._name!r} has no {'tokens' if documents else 'documents'} to train on")
            epoch, first = epoch + 1, 0

    def from_place(self, place: Place) -> Iterator[tuple[list[int], list[int], Place]]:
        return rows_of(self._documents(place), self._length)


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
