"""A checkpoint folder as redepth keeps it: written whole or not at all, with the record of how it was made."""

import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from redepth.errors import RedepthError

RECIPE_FILE = "recipe.yaml"
VERIFICATION_FILE = "verification.json"
HEALING_FILE = "healing.json"
EVALUATION_FILE = "evaluation.json"


def read_recipe(folder: Path) -> dict[str, Any]:
    """The record of how the checkpoint was made, with sections `convert` and `heal`; empty where there is none."""
    file = folder / RECIPE_FILE
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}


def write_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    (folder / RECIPE_FILE).write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")


def read_json(file: Path) -> Any | None:
    """The file's content, or None where there is no such file."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def write_json(file: Path, content: Any) -> None:
    """Write beside, then rename, so that a reader never sees half a file."""
    beside = file.with_name(f".{file.name}.partial")
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    beside.replace(file)


def write_jsonl(file: Path, records: list[dict[str, Any]]) -> None:
    """One record a line."""
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def recover(out: Path) -> None:
    """Clear up after a process that was killed inside `whole_folder(out)`.

    What was being replaced is put back, and what was not finished is removed.
    """
    for left in out.parent.glob(f".{glob.escape(out.name)}.*"):
        kind = re.fullmatch(r"\.(old|new)\.\w{8}", left.name.removeprefix(f".{out.name}"))
        if kind is not None and left.is_dir():
            if kind[1] == "old" and not out.exists() and (left / out.name).exists():
                os.replace(left / out.name, out)
            shutil.rmtree(left)


@contextmanager
def whole_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write beside `out`, which takes its place when the block ends well and vanishes when it does not."""
    if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise RedepthError(f"{out} already exists; give another folder or --overwrite")
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.new.", dir=out.parent))
    beside.chmod(0o755)
    try:
        yield beside
        replaced = None
        if out.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent)) / out.name
            os.replace(out, replaced)
        os.replace(beside, out)
        if replaced is not None:
            shutil.rmtree(replaced.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
