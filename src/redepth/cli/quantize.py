"""redepth quantize"""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from redepth import api

from .console import AsJson, Quiet, hush_libraries, print_json, progress_bar, results


def command(
    checkpoint: Annotated[str, typer.Argument(metavar="OUT", help="Folder or hub id of a recurrent checkpoint.")],
    to: Annotated[Path, typer.Argument(metavar="TO", help="Folder to write.")],
    bits: Annotated[int, typer.Option(help="Bits of a weight: 8 or 4.")] = 8,
    kind: Annotated[
        str | None,
        typer.Option(
            help="dynamic (the core computes in 8 bits) or weight-only; dynamic by default, with 4 bits weight-only."
        ),
    ] = None,
    groups: Annotated[str, typer.Option(help="What to quantise: core, or all layers.")] = "core",
    data: Annotated[
        str, typer.Option(help="Text to measure on: python-docs, a .txt, .jsonl or .parquet file, or a datasets id.")
    ] = "python-docs",
    text_column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    rows: Annotated[int, typer.Option(help="Rows of text.")] = 8,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a row.")] = 256,
    largest_loss: Annotated[
        float | None, typer.Option(help="Refuse where the loss rises by more nats at any depth; 0.02 by default.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that redepth wrote.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a copy of a checkpoint with its weights in 8 or 4 bits, and say what that costs at every depth.

    Example: redepth quantize ./smollm2-recurrent ./smollm2-int8
    """
    hush_libraries()
    with progress_bar(quiet) as update:
        record = api.quantize(
            checkpoint,
            to,
            bits=bits,
            kind=kind,
            groups=groups,
            data=data,
            text_column=text_column,
            rows=rows,
            sequence_length=sequence_length,
            largest_loss=largest_loss,
            overwrite=overwrite,
            on_progress=update,
        )
    if as_json:
        print_json(record)
    elif not quiet:
        title = f"{record['bits']} bits, {record['kind']}, {record['groups']}; {record['tokens']:,} tokens of {record['data']}"
        table = Table("r", "loss before", "loss", "KL", "same pick", title=title, title_justify="left")
        for depth, at in record["depths"].items():
            losses = (f"{at['loss_before']:.3f}", f"{at['loss']:.3f}", f"{at['kl']:.1e}", f"{at['top1_agreement']:.1%}")
            table.add_row(str(depth), *losses)
        results.print(table)
