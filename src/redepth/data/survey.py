"""A source read once from end to end before a run: that all of it can be read, its licences, and its fingerprint."""

import hashlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from .python_docs import python_docs
from .source import PYTHON_DOCS
from .text import data_file, read_documents

DOCUMENTS_BETWEEN_TELLING = 10_000


def count_licenses(
    spec: str, column: str, license: str | None, on_share: Callable[[float], None] | None = None
) -> dict[str, int | None]:
    """Read a source to its end, and count its documents by licence: None where that is not known.

    Hub data is streamed; its rows are checked as they arrive.

    Args:
        license: the source's, for documents that don't state theirs.
        on_share: called now and then with about the share that has been read.

    Raises:
        RedepthError: naming the file and the first row that can't be read.
    """
    unstated = license or "not stated"
    if spec == PYTHON_DOCS:
        return {"psf-2.0": None}
    file = data_file(spec)
    if file is None:
        return {unstated: None}
    counted: Counter[str | None] = Counter()
    characters = 0
    for number, document in enumerate(read_documents(spec, column), 1):
        counted[document.license] += 1
        characters += len(document.text)
        if on_share is not None and number % DOCUMENTS_BETWEEN_TELLING == 0:
            on_share(min(characters / file.stat().st_size, 1.0))
    if set(counted) == {None}:
        return {unstated: None}
    counted[unstated] += counted.pop(None, 0)
    return {str(name): documents for name, documents in counted.most_common() if documents}


def fingerprint(*files: Path) -> str:
    """SHA-256 of the names and contents of files."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def fingerprint_text(spec: str) -> str | None:
    """The fingerprint of a source; None for hub data, which is not stored here."""
    if spec == PYTHON_DOCS:
        return hashlib.sha256("\0".join(python_docs()).encode()).hexdigest()
    file = data_file(spec)
    return None if file is None else fingerprint(file)
