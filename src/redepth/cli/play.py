"""redepth play"""

from typing import Annotated

import typer

from redepth import api

from .console import Checkpoint, Device, Dtype, Quiet, hush_libraries, remarks
from .serve import Host, MaxRows, MaxTokens


def command(
    checkpoint: Checkpoint,
    other: Annotated[
        str | None, typer.Argument(metavar="OTHER", help="Another checkpoint, to compare side by side.")
    ] = None,
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 7860,
    host: Host = api.LOOPBACK,
    max_rows: MaxRows = api.MAX_ROWS,
    max_tokens: MaxTokens = api.MAX_TOKENS,
    max_num_steps: Annotated[int | None, typer.Option(help="Where the depth sliders end.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Open a page on which text is shaded by the steps that each token took, with the depth on a slider.

    Example: redepth play ./smollm2-recurrent

    Example: redepth play demo/looped demo/static
    """
    hush_libraries()

    def say(where: str) -> None:
        if not quiet:
            remarks.print(f"open {where}; Ctrl-C ends it", soft_wrap=True)

    api.play(
        checkpoint,
        other,
        host=host,
        port=port,
        max_rows=max_rows,
        max_tokens=max_tokens,
        max_num_steps=max_num_steps,
        dtype=dtype,
        device=device,
        on_start=say,
    )
