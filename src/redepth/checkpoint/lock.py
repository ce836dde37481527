"""Only one process at a time writes into a checkpoint folder; others are told which one it is."""

import json
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from redepth.errors import RedepthError, first_line

WORK_FOLDER = ".redepth"  # there while a command writes: the lock, its owner, and files that are not yet in place
LOCK_FILE, OWNER_FILE = "lock", "owner.json"
TRIES = 5  # to make the lock's file, while another process that is done removes the folder around it

# The folders that this process holds, by path, with the thread that does.
_held: dict[Path, int] = {}


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the folder, which is made where there is none; what was made is removed again if nothing was put into it.

    The kernel drops the lock of a process that ends, however it ends, so an owner's record left behind means nothing by
    itself: it only tells others which process they wait for. A thread may lock a folder again that it already holds.

    Yields:
        whether this is the outermost hold.

    Raises:
        RedepthError: naming the owner, or saying that the folder can't be written.
    """
    if _held.get(folder) == threading.get_ident():
        yield False
        return
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        with _held_by_us(folder):
            yield True
    finally:
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


@contextmanager
def _held_by_us(folder: Path) -> Iterator[None]:
    work = folder / WORK_FOLDER
    lock = _acquire(folder, work)
    _held[folder] = threading.get_ident()
    try:
        _write_owner(work / OWNER_FILE)
        yield
    finally:
        del _held[folder]
        # Removed while it is still held: whoever opened the file meanwhile sees that it has lost its name, and tries
        # anew.
        if _holds_the_lock_alone(work):
            shutil.rmtree(work, ignore_errors=True)
        lock.release()


def owner(folder: Path) -> str:
    """Who holds the folder, in their own words."""
    try:
        record = json.loads((folder / WORK_FOLDER / OWNER_FILE).read_text(encoding="utf-8"))
        return "process {pid} on {host} ({command}, since {since})".format(**record)
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _acquire(folder: Path, work: Path) -> FileLock:
    lock = FileLock(work / LOCK_FILE, timeout=0)
    for attempt in range(TRIES):
        try:
            work.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise RedepthError(f"{folder} is being written by {owner(folder)}; wait for it, or end it first") from None
        except OSError as error:
            if isinstance(error, FileNotFoundError) and attempt + 1 < TRIES:
                time.sleep(0.01)
                continue
            reason = error.strerror or first_line(error)
            raise RedepthError(f"{folder} can't be written: {reason}; give another folder") from None
        else:
            break
    return lock


def _write_owner(file: Path) -> None:
    record = {
        "pid": os.getpid(),
        "host": platform.node(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]]),
        "since": datetime.now().isoformat(timespec="seconds"),
    }
    file.write_text(json.dumps(record), encoding="utf-8")


def _holds_the_lock_alone(work: Path) -> bool:
    return work.is_dir() and {entry.name for entry in work.iterdir()} <= {LOCK_FILE, OWNER_FILE}
