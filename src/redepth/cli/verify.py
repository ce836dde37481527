"""redepth verify"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from .console import AsJson, Quiet, hush_libraries, print_json, remarks, results

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
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Prove a conversion exact: full cover against the source, with a negative control.

    Example: redepth verify ./smollm2-recurrent --against smollm2-135m
    """
    hush_libraries()
    from redepth.errors import RedepthError
    from redepth.surgery.verify import verify

    if quiet:
        verification = verify(out, against)
    else:
        with remarks.status("verify") as status:
            verification = verify(out, against, on_check=lambda part: status.update(f"verify: {part}"))
    if as_json:
        print_json(verification.to_dict())
    elif not quiet:
        show(verification)
    if not verification.passed:
        failed = next(check for check in verification.checks if not check.passed)
        raise RedepthError(f"{out} does not pass: {failed.name} {failed.verdict} with a logits MSE of {failed.mse:.1e}")
