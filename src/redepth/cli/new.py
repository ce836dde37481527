"""redepth new"""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from redepth import api
from redepth.errors import RedepthError

from .console import SEEDS, AsJson, Quiet, hush_libraries, print_json, results


def command(
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="Folder to write.")] = None,
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(api.PRESETS)}.")] = "nano",
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub id to take a tokenizer from; sets the vocabulary.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of the random weights.", **SEEDS)] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that redepth wrote.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count the parameters; make no weights.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make a fresh model with the published initialisation.

    Example: redepth new ./fresh --preset 100m
    """
    if out is None and not dry_run:
        raise RedepthError("OUT is missing; name the folder to write, or add --dry-run to count parameters alone")
    hush_libraries()
    count = api.create(
        None if dry_run else out, preset, tokenizer=tokenizer, dtype=dtype, seed=seed, overwrite=overwrite
    ).parameters
    if as_json:
        print_json({"preset": preset, "parameters": count.by_part()})
    elif not quiet:
        table = Table("part", "parameters", title=preset)
        for part, size in count.by_part().items():
            table.add_row(part, f"{size:,}" if size else "tied")
        results.print(table)
