"""redepth heal"""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import AsJson, Quiet, hush_libraries, loss_table, print_json, progress_bar, results

if TYPE_CHECKING:
    from redepth.healing.trainer import Progress


def note(record: "Progress") -> str:
    if record.loss is None or record.mean_recurrence is None:
        return ""
    rate = f", {record.tokens_per_second:,.0f} tokens/s" if record.tokens_per_second else ""
    return f"step {record.step}, loss {record.loss:.3f}, mean r {record.mean_recurrence:.1f}{rate}"


def command(
    checkpoint: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a recurrent checkpoint.")],
    recipe: Annotated[Path | None, typer.Option(help="YAML file with a section 'heal'.")] = None,
    to: Annotated[Path | None, typer.Option(help="Write the healed model here instead of in place.")] = None,
    data: Annotated[
        str | None, typer.Option(help="python-docs, a .txt, .jsonl or .parquet file, or a datasets id.")
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="Column that holds the text.")] = None,
    validation: Annotated[
        str | None, typer.Option(help="Held-out text; the data's first documents by default.")
    ] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens in a row.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows in an optimiser step.")] = None,
    micro_batch_size: Annotated[int | None, typer.Option(help="Rows in memory at once.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    max_minutes: Annotated[float | None, typer.Option(help="End after this time if it comes first.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="AdamW's rate.")] = None,
    mean_recurrence: Annotated[float | None, typer.Option(help="Mean of the sampled depth at the end.")] = None,
    backprop_depth: Annotated[int | None, typer.Option(help="Last steps that carry a gradient.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, bf16 or fp32.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of data order, depths and noise.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train a recurrent model so that it makes use of its depth.

    Flags go over the recipe. An interrupted run goes on when the same command is given again.

    Example: redepth heal ./smollm2-recurrent --data python-docs --recipe recipes/demo.yaml
    """
    hush_libraries()
    from redepth.healing.recipe import read_heal_recipe
    from redepth.healing.trainer import heal

    settings = read_heal_recipe(
        recipe,
        data=data,
        text_column=text_column,
        validation=validation,
        sequence_length=sequence_length,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        max_steps=max_steps,
        max_minutes=max_minutes,
        learning_rate=learning_rate,
        mean_recurrence=mean_recurrence,
        backprop_depth=backprop_depth,
        precision=precision,
        seed=seed,
    )
    with progress_bar(quiet) as update:
        healing = heal(checkpoint, settings, to, lambda record: update(record.part, record.done, note(record)))
    if as_json:
        print_json(asdict(healing))
    elif not quiet:
        title = f"held-out loss in nats per token, {healing.tokens:,} tokens in {healing.minutes:.1f} minutes"
        results.print(loss_table(title, {"before": healing.loss_before, "after": healing.loss_after}))
