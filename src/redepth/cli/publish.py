"""redepth publish"""

from typing import Annotated

import typer

from redepth import api

from .console import AsJson, Quiet, hush_libraries, print_json, remarks, results


def command(
    checkpoint: Annotated[str, typer.Argument(metavar="OUT", help="Folder of a recurrent checkpoint.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="Hub repository, such as you/your-model.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the files and the card; send nothing.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    even_unfinished: Annotated[
        bool,
        typer.Option(
            "--even-unfinished",
            help="Also a checkpoint that is not verified, healed or calibrated, or without a licence.",
        ),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Upload a checkpoint with its card, modelling files and records to the hub.

    Example: redepth publish ./smollm2-retrofit you/smollm2-retrofit --dry-run
    """
    hush_libraries()
    if dry_run:
        plan = api.plan_publication(checkpoint, repository)
    else:
        plan = api.publish(checkpoint, repository, private=private, even_unfinished=even_unfinished)
    if as_json:
        print_json(plan.as_dict())
    elif dry_run:
        for name, size in plan.files.items():
            results.print(f"{size:>14,}  {name}", highlight=False, markup=False)
        results.print(f"\n{plan.card}", highlight=False, markup=False, soft_wrap=True)
    elif not quiet:
        results.print(f"{len(plan.files)} files at {plan.url}", soft_wrap=True, highlight=False)
    if dry_run and plan.lacks and not quiet:
        remarks.print(f"not ready to publish: {'; '.join(plan.lacks)}", soft_wrap=True, highlight=False)
