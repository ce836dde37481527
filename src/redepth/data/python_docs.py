"""Text that every machine has: Python's own documentation, for the demo, the tests and verification."""

import ast
import inspect
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

# Not documentation of the language and its library.
_SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "ensurepip"}
_SHORTEST = 400  # characters; shorter documents carry no context
_HELD_OUT_ONE_IN = 20


def _docstrings(file: Path) -> str:
    """All docstrings of one module, each under the name of what it documents."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return ""
    parts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                parts.append(f"{getattr(node, 'name', file.stem)}\n\n{inspect.cleandoc(text)}")
    return "\n\n\n".join(parts)


def _documents() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield f"topic {name}", text.strip()
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        relative = file.relative_to(library)
        if not _SKIPPED.intersection(relative.parts):
            yield relative.as_posix(), _docstrings(file)


@cache
def python_docs(held_out: bool = False) -> list[str]:
    """Documents of the running Python: the language reference's topics and the library's docstrings, one a module.

    Args:
        held_out: return the twentieth of the documents that training never sees, instead of the rest.

    Returns:
        texts, in an order that depends on the Python version alone.
    """
    chosen = []
    for name, text in _documents():
        is_held_out = zlib.crc32(name.encode()) % _HELD_OUT_ONE_IN == 0
        if len(text) >= _SHORTEST and is_held_out == held_out:
            chosen.append(text)
    return chosen
