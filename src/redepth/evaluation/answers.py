"""Answers of a model kept on disk as they come, so that a killed evaluation goes on where it was."""

import hashlib
import json
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redepth.errors import RedepthError, first_line


@dataclass(frozen=True)
class Answer:
    """What a model said to a request, and what that took.

    Attributes:
        said: a text, or (log-likelihood in nats, whether greedy decoding would say it).
        tokens: that were run, as if the request had been asked by itself.
        mean_steps: over these tokens; 0 for a model without a loop.
    """

    said: Any
    tokens: int
    mean_steps: float


def key_of(*parts: Any) -> str:
    """A name for everything that an answer depends on."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


class Answers:
    """A table from keys to answers in an SQLite file, or in memory where there is no file.

    Raises:
        RedepthError: for a file that is something else.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        try:
            self._table = sqlite3.connect(file if file is not None else ":memory:")
            self._table.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, said TEXT, tokens INTEGER, mean_steps REAL)"
            )
        except sqlite3.Error as error:
            raise RedepthError(f"{file} is no table of answers: {first_line(error)}; give another --out") from None

    def find(self, key: str) -> Answer | None:
        row = self._table.execute("SELECT said, tokens, mean_steps FROM answers WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        said = json.loads(row[0])
        return Answer(tuple(said) if isinstance(said, list) else said, row[1], row[2])

    def get(self, key: str) -> Answer:
        """As `find`, of what must be there.

        Raises:
            KeyError: where it is not.
        """
        answer = self.find(key)
        if answer is None:
            raise KeyError(key)
        return answer

    def keep(self, answers: Iterable[tuple[str, Answer]]) -> None:
        """All of them or none: a batch is one transaction."""
        rows = [(key, json.dumps(answer.said), answer.tokens, answer.mean_steps) for key, answer in answers]
        try:
            with self._table:
                self._table.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", rows)
        except sqlite3.Error as error:
            raise OSError(f"{self._file} can't be written: {first_line(error)}") from None

    def close(self) -> None:
        self._table.close()
