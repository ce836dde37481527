"""redepth retrofit"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from redepth import api

from .console import AsJson, Quiet, hush_libraries, loss_table, print_json, progress_bar, results
from .heal import listener, show_preflight, with_recipe_flags


@with_recipe_flags
def command(
    recipe: Annotated[Path, typer.Argument(help="YAML file with sections convert, heal, calibrate and evaluate.")],
    out: Annotated[Path | None, typer.Argument(help="Folder to write; the recipe's name by default.")] = None,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="End in healing.png and report.html beside the model.")
    ] = True,
    as_json: AsJson = False,
    quiet: Quiet = False,
    **changes: Any,
) -> None:
    """Convert, verify, heal, calibrate and evaluate by one recipe, and report.

    Finished parts are not repeated, and an interrupted healing run resumes. Flags override the section heal.

    Example: redepth retrofit recipes/smollm2-135m-2core.yaml ./smollm2-retrofit
    """
    hush_libraries()
    with progress_bar(quiet) as update:
        told = None if quiet or as_json else show_preflight
        evaluation = api.retrofit(
            recipe, out, on_progress=listener(update, quiet), on_preflight=told, report=report, **changes
        )
    if as_json:
        print_json(asdict(evaluation))
    elif not quiet:
        source = "" if evaluation.source_loss is None else f"; the source has {evaluation.source_loss:.3f}"
        title = f"held-out loss in nats per token, {evaluation.tokens:,} tokens{source}"
        results.print(loss_table(title, {"retrofit": evaluation.loss}))
