"""redepth serve"""

from typing import Annotated

import typer

from redepth import api

from .console import Checkpoint, Device, Dtype, Quiet, hush_libraries, remarks

Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")]
MaxRows = Annotated[int, typer.Option(help="Requests that run at a time; the others wait.")]
MaxTokens = Annotated[int, typer.Option(help="Room for the keys and values of all running requests, in tokens.")]


def command(
    checkpoint: Checkpoint,
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    host: Host = api.LOOPBACK,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="REDEPTH_API_KEY", help="What requests must carry as a bearer token; none by default."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's name in requests; the folder's by default.")] = None,
    max_rows: MaxRows = api.MAX_ROWS,
    max_tokens: MaxTokens = api.MAX_TOKENS,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help=f"The longest prompt, in tokens; {api.LIMITS.prompt_tokens} by default.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help=f"The longest answer, in tokens; {api.LIMITS.new_tokens} by default.")
    ] = None,
    max_num_steps: Annotated[
        int | None, typer.Option(help=f"The deepest num_steps of a request; {api.LIMITS.num_steps} by default.")
    ] = None,
    max_body_bytes: Annotated[
        int | None, typer.Option(help=f"The largest body of a request; {api.LIMITS.body_bytes} by default.")
    ] = None,
    max_queue: Annotated[
        int | None, typer.Option(help=f"How many requests may wait; {api.LIMITS.queue} by default.")
    ] = None,
    max_seconds: Annotated[
        float | None, typer.Option(help=f"The longest that a request may take; {api.LIMITS.seconds:g} by default.")
    ] = None,
    drain_seconds: Annotated[
        float, typer.Option(help="On SIGTERM: how long answers under way may still take.")
    ] = api.DRAIN_SECONDS,
    replicas: Annotated[
        int, typer.Option(help="Processes that serve, each with its own model; more than one run under Ray Serve.")
    ] = 1,
    dtype: Dtype = "auto",
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Serve a checkpoint by OpenAI's protocol, every request at its own depth.

    Example: redepth serve ./smollm2-recurrent --port 8000
    """
    hush_libraries()

    def say(called: str, where: str) -> None:
        if not quiet:
            remarks.print(f"{called} at {where}/v1, metrics at {where}/metrics; Ctrl-C ends it", soft_wrap=True)

    api.serve(
        checkpoint,
        host=host,
        port=port,
        name=name,
        api_key=api_key,
        max_rows=max_rows,
        max_tokens=max_tokens,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        max_num_steps=max_num_steps,
        max_body_bytes=max_body_bytes,
        max_queue=max_queue,
        max_seconds=max_seconds,
        drain_seconds=drain_seconds,
        replicas=replicas,
        dtype=dtype,
        device=device,
        on_start=say,
    )
