"""redepth eval"""

import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from redepth import api
from redepth.errors import RedepthError

from .console import (
    SEEDS,
    AsJson,
    Checkpoint,
    Device,
    Quiet,
    hush_libraries,
    print_json,
    progress_bar,
    remarks,
    results,
)

WIDE = 160  # letters in a line of a table where there is no terminal


def command(
    checkpoint: Checkpoint,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="lm-eval's tasks by name, problems by difficulty as task:NAME?option=value, and texts as text:FILE, with "
            "commas or by repeating the flag; by default the task that the model was trained on."
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="huginn or retrofit: the tasks and settings of the published models; --tasks narrows them."),
    ] = None,
    num_steps: Annotated[
        str | None,
        typer.Option(help="Depths to measure at, separated by commas; 1,2,4,8,16 or the preset's by default."),
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(help="Also run adaptive exit under this test: kl, argmax-stability, …, or package.module:name."),
    ] = None,
    exit_threshold: Annotated[str, typer.Option(help="Threshold of the exit test; auto for its default.")] = "auto",
    limit: Annotated[
        int | None,
        typer.Option(help="Documents of each task, all by default; of task:, problems of each split, 256 by default."),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in each prompt; the task's own number by default.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with NAME.jsonl for each of lm-eval's tasks, in place of the hub.")
    ] = None,
    questions: Annotated[int, typer.Option(help="Questions in each problem of task: in words.", min=1)] = 1,
    batch_size: Annotated[int, typer.Option(help="Requests that are run at once.")] = 8,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            help="Another model to measure beside it, such as the source, or a static control as FOLDER:1; with commas or by "
            "repeating the flag."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the problems of task:.", **SEEDS)] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write; a killed evaluation in it goes on. The checkpoint's name with -evaluation by default."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto (as saved), float32, bfloat16 or float16; auto or the preset's by default.")
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure accuracy on tasks, and the loss on texts, at several depths of a checkpoint and beside other models.

    Example: redepth eval ./healed --tasks arc_easy,sciq,task:iterate --num-steps 1,2,4,8 --compare smollm2-135m

    Example: redepth eval ./healed --tasks arc_easy --data-dir ./rows --limit 100 --criterion kl

    Example: redepth eval demo/looped --compare demo/static:1
    """
    hush_libraries()
    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval draws bars of its own
    threshold: float | str = "auto" if exit_threshold == "auto" else _number(exit_threshold)
    with progress_bar(quiet or as_json) as update:
        found = api.evaluate(
            checkpoint,
            _split(tasks),
            preset=preset,
            num_steps=parse_depths(num_steps) if num_steps is not None else None,
            criterion=criterion,
            exit_threshold=threshold,
            limit=limit,
            num_fewshot=num_fewshot,
            data_dir=data_dir,
            questions=questions,
            batch_size=batch_size,
            compare=_split(compare),
            seed=seed,
            dtype=dtype,
            device=device,
            out=out,
            on_progress=update,
        )
    if as_json:
        print_json(found.as_dict())
        return
    for table in found.tables():
        (results if results.is_terminal else Console(width=WIDE)).print(shown(table))
    if found.out is not None and not quiet:
        remarks.print(f"written to {found.out}", soft_wrap=True)


def _split(texts: list[str] | None) -> list[str] | None:
    """`a,b` and a repeated flag mean the same."""
    parts = [part.strip() for text in texts or () for part in text.split(",")]
    return [part for part in parts if part] or None


def parse_depths(text: str) -> list[int]:
    """Numbers of steps from `1,2,4`.

    Raises:
        RedepthError: for anything else.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise RedepthError(f"--num-steps takes whole numbers from 1 up with commas between them, got {text!r}")
    return [int(part) for part in parts]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RedepthError(f"--exit-threshold must be auto or a number, got {text!r}") from None


def shown(table: Any) -> Table:
    """A `TextTable` for the terminal; columns of numbers are flush right."""
    made = Table(
        title=table.title,
        title_justify="left",
        caption=table.note or None,
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for place, name in enumerate(table.header):
        numbers = all(re.match(r"[-+]?\d|$", row[place]) for row in table.rows)
        made.add_column(name, justify="right" if numbers else "left")
    for row in table.rows:
        made.add_row(*row)
    return made
