"""redepth eval"""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from redepth import api
from redepth.errors import RedepthError

from .console import (
    SEEDS,
    AsJson,
    Checkpoint,
    Device,
    Dtype,
    Quiet,
    hush_libraries,
    print_json,
    progress_bar,
    remarks,
    results,
)


def command(
    checkpoint: Checkpoint,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="task:NAME?option=value; repeat the flag for several; by default the task the model was trained on."
        ),
    ] = None,
    num_steps: Annotated[str, typer.Option(help="Depths to measure at, separated by commas.")] = "1,2,4,8,16",
    criterion: Annotated[
        str | None,
        typer.Option(help="Also run adaptive exit under this test: kl, argmax-stability, …, or package.module:name."),
    ] = None,
    exit_threshold: Annotated[str, typer.Option(help="Threshold of the exit test; auto for its default.")] = "auto",
    limit: Annotated[int, typer.Option(help="Number of problems from each split.")] = 256,
    questions: Annotated[int, typer.Option(help="Questions in each problem in words.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the problems.", **SEEDS)] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for tasks.json and a heat map of each task.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure accuracy on tasks by difficulty and number of steps.

    Example: redepth eval ./out --tasks 'task:iterate?depth=1-8' --num-steps 1,2,4,8,16
    """
    hush_libraries()
    depths = parse_depths(num_steps)
    threshold: float | str = "auto" if exit_threshold == "auto" else _number(exit_threshold)
    with progress_bar(quiet or as_json) as update:
        found = api.evaluate(
            checkpoint,
            tasks,
            num_steps=depths,
            criterion=criterion,
            exit_threshold=threshold,
            limit=limit,
            questions=questions,
            seed=seed,
            dtype=dtype,
            device=device,
            out=out,
            on_progress=update,
        )
    if out is not None and not quiet:
        remarks.print(f"written to {out}")
    if as_json:
        print_json([one.as_dict() for one in found])
        return
    for one in found:
        results.print(accuracy_table(one))
        if one.exits is not None:
            ends = one.exits
            results.print(
                f"adaptive exit ({ends.criterion}, threshold {ends.threshold}, at most {ends.num_steps} steps): accuracy "
                f"{100 * ends.overall:.1f} % against {100 * ends.overall_fixed:.1f} % at r = {ends.num_steps}; Spearman of "
                f"difficulty and steps {ends.spearman:.2f}"
            )


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


def accuracy_table(found: Any) -> Table:
    """One task's accuracy in per cent, with standard errors from 0.5 up, a row for each difficulty."""
    columns = ["difficulty", "answers", *(f"r={steps}" for steps in found.num_steps)]
    if found.exits is not None:
        columns += ["exit step", "right"]
    beyond = bool(found.trained_most) and found.difficulties[-1] > found.trained_most
    table = Table(
        title=f"{found.task}: accuracy in per cent",
        title_justify="left",
        caption="* more difficult than anything trained" if beyond else None,
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for number, difficulty in enumerate(found.difficulties):
        star = "*" if beyond and difficulty > found.trained_most else " "
        cells = [
            f"{100 * value:.0f}" + (f"±{100 * error:.0f}" if error >= 0.005 else "")
            for value, error in zip(found.accuracy[number], found.standard_error[number], strict=True)
        ]
        if found.exits is not None:
            cells += [f"{found.exits.mean_steps[number]:.1f}", f"{100 * found.exits.accuracy[number]:.0f}"]
        table.add_row(f"{difficulty}{star}", str(found.answers[number]), *cells)
    return table
