"""What the commands share: options, progress, and results for people or machines."""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print neither progress nor remarks.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Checkpoint = Annotated[str, typer.Argument(metavar="OUT", help="Folder or hub id of a recurrent checkpoint.")]
Dtype = Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="Where to run: auto (a GPU where there is one), cpu, cuda, cuda:1, …")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a source on the hub.")]
FamilyFile = Annotated[
    Path | None, typer.Option("--family", help="YAML file for an architecture that redepth has no family for.")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let modelling code that comes with the source run.")
]

# What torch's and numpy's generators both take.
SEEDS: Any = {"min": 0, "max": 2**32 - 1}
SECONDS_BETWEEN_LINES = 30.0

remarks = Console(stderr=True)
results = Console()


def hush_libraries() -> None:
    """Keep other libraries' bars and warnings out of redepth's output; what is not imported yet stays so."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ |= {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    # Those that are imported have read their environment already.
    if "transformers.utils.logging" in sys.modules:
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
    if "datasets" in sys.modules:
        from datasets.utils.logging import disable_progress_bar

        disable_progress_bar()


def number_or_word(text: str) -> float | str:
    """A threshold as the policy takes it: a number, or a word such as `auto` or `99%`."""
    try:
        return float(text)
    except ValueError:
        return text


def print_json(content: Any) -> None:
    print(json.dumps(content, indent=2))


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Callable[..., None]]:
    """Yields `update(part, done, note="")` with `done` in [0, 1]; a part's bar appears when it is first named.

    Where standard error is no terminal, lines take the bars' place.
    """
    if quiet:
        yield lambda part, done, note="": None
        return
    if not remarks.is_terminal:
        yield from _progress_lines()
        return
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    progress = Progress(*columns, console=remarks)
    tasks: dict[str, Any] = {}

    def update(part: str, done: float, note: str = "") -> None:
        progress.start()  # not before there is something to show, so that an early mistake stays one line
        if part not in tasks:
            tasks[part] = progress.add_task(part, total=1.0, note="")
        progress.update(tasks[part], completed=done, note=note)

    try:
        yield update
    finally:
        if tasks:
            progress.stop()


def _progress_lines() -> Iterator[Callable[..., None]]:
    """For log files: a line when a part has ended, and every SECONDS_BETWEEN_LINES while it lasts."""
    said_at: dict[str, float] = {}
    unsaid: dict[str, str] = {}

    def say(part: str) -> None:
        said_at[part] = time.monotonic()
        remarks.print(unsaid.pop(part), highlight=False, soft_wrap=True)

    def update(part: str, done: float, note: str = "") -> None:
        unsaid[part] = f"{part} {100 * done:.0f} %" + (f": {note}" if note else "")
        waited = time.monotonic() - said_at.setdefault(part, time.monotonic())
        if done >= 1 or waited >= SECONDS_BETWEEN_LINES:
            say(part)

    try:
        yield update
    finally:
        for part in list(unsaid):
            say(part)


def loss_table(title: str, rows: dict[str, dict[int, float]]) -> Table:
    """Losses by number of steps, a row for each label."""
    depths = list(next(iter(rows.values())))
    table = Table("", *(f"r = {depth}" for depth in depths), title=title, title_justify="left")
    for label, losses in rows.items():
        table.add_row(label, *(f"{losses[depth]:.3f}" for depth in depths))
    return table
