"""redepth calibrate"""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from redepth import api

from .console import AsJson, Device, Dtype, Quiet, hush_libraries, print_json, progress_bar, results

LAYOUT: dict[str, Any] = {"title_justify": "left", "box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0)}
FORMS = ("{:.3f}", "{:.1e}", "{:.1%}")
SHOWN = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # numbers of steps in the table


def command(
    checkpoint: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a recurrent checkpoint.")],
    data: Annotated[
        str, typer.Option(help="Held-out text: python-docs, a .txt, .jsonl or .parquet file, or a datasets id.")
    ] = "python-docs",
    text_column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    most_steps: Annotated[
        int | None, typer.Option(help="Deepest r to measure; by default twice the trained depth, at least 16.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows of text to measure on.")] = 16,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a row.")] = 256,
    criteria: Annotated[
        list[str] | None,
        typer.Option(
            "--criterion", help="Another exit test to calibrate: package.module:name; repeat the flag for several."
        ),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure what each step of depth buys, and store the depth to use in the checkpoint.

    Writes `depth_profile` into config.json: the default num_steps, the range of depths that work, and the exit thresholds
    that keep 99 % or 95 % of the deepest step's picks (--exit-threshold 99%).

    Example: redepth calibrate ./smollm2-recurrent --data python-docs --most-steps 32
    """
    hush_libraries()
    with progress_bar(quiet) as update:
        profile = api.calibrate(
            checkpoint,
            data,
            text_column=text_column,
            most_steps=most_steps,
            rows=rows,
            sequence_length=sequence_length,
            criteria=criteria,
            dtype=dtype,
            device=device,
            on_progress=update,
        )
    if as_json:
        print_json(profile)
    elif not quiet:
        _print(profile)


def _print(profile: dict[str, Any]) -> None:
    depths = [depth for depth in SHOWN if depth <= len(profile["loss"])]
    title = f"{profile['tokens']:,} tokens of {profile['data']}; on the right, the share of tokens that each exit test has released"
    tests = (name.replace("-", " ") for name in profile["exit_rates"])  # so that a narrow column can break them
    table = Table("r", "loss", "KL to deepest", "same pick", *tests, title=title, **LAYOUT)
    for depth in depths:
        measured = [profile[key][depth - 1] for key in ("loss", "kl_to_deepest", "agreement")]
        left = (f"{rates[depth - 1]:.0%}" for rates in profile["exit_rates"].values())
        table.add_row(str(depth), *(form.format(x) for form, x in zip(FORMS, measured, strict=True)), *left)
    results.print(table)
    wanted = list(next(iter(profile["thresholds"].values())))
    exits = Table("exit test", *(f"{label}: threshold (steps)" for label in wanted), **LAYOUT)
    found = {name: (kept, profile["mean_steps"][name]) for name, kept in profile["thresholds"].items()}
    for name, head in (profile["exit_heads"] or {"tests": {}})["tests"].items():
        found[f"{name}, exit head"] = (head["thresholds"], head["mean_steps"])
    for name, (thresholds, steps) in found.items():
        exits.add_row(
            name,
            *(
                f"{thresholds[label]:g} ({steps[label]:.1f})" if thresholds[label] is not None else "none"
                for label in wanted
            ),
        )
    results.print(exits)
    least, most = profile["valid_range"]
    results.print(f"default from now on: r = {profile['num_steps']}; usable from r = {least} to {most}")
