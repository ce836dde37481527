"""redepth analyze"""

from pathlib import Path
from typing import Annotated

import typer

from redepth import api

from .console import AsJson, Checkpoint, Device, Dtype, Quiet, hush_libraries, print_json, progress_bar, results


def command(
    checkpoint: Checkpoint,
    prompt: Annotated[list[str] | None, typer.Option(help="A text to look at; repeat the flag for more.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Held-out text: python-docs, a .txt, .jsonl or .parquet file, or a datasets id; or held-out problems as "
            "task:NAME?option=value. By default the task that the model was trained on."
        ),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    rows: Annotated[int, typer.Option(help="Number of rows or problems to take from --data.")] = 4,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a row of --data.")] = 128,
    num_steps: Annotated[int, typer.Option(help="Number of steps to look at, at least 7.")] = 32,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write; the checkpoint's name with -analysis by default.")
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            help="Another model to run on the same texts: the checkpoint before healing, the source, or a static control as "
            "FOLDER:1."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that redepth wrote.")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Look inside the loop: where each token's state goes, what each step would say, and what depth changes.

    Writes report.html, pictures as PNG and SVG, and tables as parquet.

    Example: redepth analyze ./smollm2-recurrent --prompt "The capital of France is Paris, and that of Italy is"

    Example: redepth analyze ./healed --data held-out.jsonl --num-steps 16 --compare ./converted

    Example: redepth analyze demo/looped --compare demo/static:1
    """
    hush_libraries()
    with progress_bar(quiet) as update:
        summary = api.analyze(
            checkpoint,
            prompt or (),
            data,
            out=out,
            num_steps=num_steps,
            compare=compare,
            text_column=text_column,
            rows=rows,
            sequence_length=sequence_length,
            dtype=dtype,
            device=device,
            overwrite=overwrite,
            on_progress=lambda name, done: update(Path(name).name[:14], done),
        )
    if as_json:
        print_json(summary)
    elif not quiet:
        results.print(summary["verdict"], soft_wrap=True, highlight=False)
        if "compare" in summary:
            results.print(f"{summary['compare']['checkpoint']}: {summary['compare']['verdict']}", soft_wrap=True)
        results.print(f"report: {summary['out']}/report.html", soft_wrap=True, highlight=False)
