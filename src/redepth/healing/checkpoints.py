"""The checkpoints that a run resumes from: whole or not used, with the run's own state beside Trainer's."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from redepth.checkpoint.folder import read_json, write_json

RUN_FILE = "run.json"


def seal(checkpoint: Path, run_state: dict[str, Any]) -> None:
    """Write `run.json`, the last file of a checkpoint: the run's state, and the size of every other file.

    A checkpoint without it was interrupted; one whose files differ from it was damaged.
    """
    sizes = {
        str(file.relative_to(checkpoint)): file.stat().st_size
        for file in sorted(checkpoint.rglob("*"))
        if file.is_file() and file.name != RUN_FILE
    }
    write_json(checkpoint / RUN_FILE, run_state | {"files": sizes})


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if it is whole."""
    try:
        state = read_json(checkpoint / RUN_FILE)
        if state is None:
            return "was not finished"
        for name, size in state["files"].items():
            file = checkpoint / name
            if not file.is_file():
                return f"lacks {name}"
            if file.stat().st_size != size:
                return f"has {file.stat().st_size:,} of the {size:,} bytes of {name}"
    except (ValueError, KeyError, TypeError):
        return f"has an unreadable {RUN_FILE}"
    return None


def last_whole(work: Path, remark: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint in the work folder; damaged ones are reported, and removed by the next `sweep`."""
    for checkpoint in reversed(checkpoints_in(work)):
        trouble = damage(checkpoint)
        if trouble is None:
            return checkpoint
        remark(f"{checkpoint.name} {trouble}, so it is passed over")
    return None


def sweep(work: Path) -> None:
    """Remove damaged checkpoints, which would otherwise count among those that are kept."""
    for checkpoint in checkpoints_in(work):
        if damage(checkpoint) is not None:
            shutil.rmtree(checkpoint)


def checkpoints_in(work: Path) -> list[Path]:
    """Oldest first."""
    found = [folder for folder in work.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if folder.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda folder: int(folder.name.rpartition("-")[2]))
