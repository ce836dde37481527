"""redepth verify"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from redepth import api
from redepth.errors import RedepthError

from .console import (
    AsJson,
    Device,
    Quiet,
    Revision,
    TrustRemoteCode,
    hush_libraries,
    print_json,
    progress_bar,
    results,
)

if TYPE_CHECKING:
    from redepth.surgery.verify import Verification


def show(verification: "Verification") -> None:
    title = f"logits in fp32 on {verification.num_tokens} tokens of {verification.text}"
    table = Table("check", "r", "MSE", "largest difference", "KL", "top-1", "verdict", title=title)
    for check in verification.checks:
        colour = "green" if check.passed else "red"
        table.add_row(
            check.name,
            str(check.num_steps),
            f"{check.mse:.1e}",
            f"{check.largest_difference:.1e}",
            f"{check.kl:.1e}",
            f"{check.top1_agreement:.1%}",
            f"[{colour}]{check.verdict}[/]",
        )
    results.print(table)


def command(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder made by redepth convert.")],
    against: Annotated[
        str | None, typer.Option(help="Source to compare with; by default the one that OUT names.")
    ] = None,
    device: Device = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Prove a conversion exact: full cover against the source, with a negative control.

    Example: redepth verify ./smollm2-recurrent --against smollm2-135m
    """
    hush_libraries()
    with progress_bar(quiet) as update:
        verification = api.verify(
            out, against, device=device, revision=revision, trust_remote_code=trust_remote_code, on_progress=update
        )
    if as_json:
        print_json(verification.to_dict())
    elif not quiet:
        show(verification)
    if not verification.passed:
        failed = next(check for check in verification.checks if not check.passed)
        raise RedepthError(f"{out} does not pass: {failed.name} {failed.verdict} with a logits MSE of {failed.mse:.1e}")
