"""Verbs that answer others: a server, and a page."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redepth.errors import RedepthError
from redepth.serving.limits import DRAIN_SECONDS, MAX_ROWS, MAX_TOKENS, Limits

if TYPE_CHECKING:
    import torch

LOOPBACK = "127.0.0.1"
LIMITS = Limits()  # where nothing else is asked for


def serve(
    checkpoint: str | Path,
    *,
    host: str = LOOPBACK,
    port: int = 8000,
    name: str | None = None,
    api_key: str | None = None,
    max_rows: int = MAX_ROWS,
    max_tokens: int = MAX_TOKENS,
    max_prompt_tokens: int | None = None,
    max_new_tokens: int | None = None,
    max_num_steps: int | None = None,
    max_body_bytes: int | None = None,
    max_queue: int | None = None,
    max_seconds: float | None = None,
    drain_seconds: float = DRAIN_SECONDS,
    replicas: int = 1,
    dtype: str = "auto",
    device: "str | torch.device" = "auto",
    on_start: Callable[[str, str], Any] | None = None,
) -> None:
    """Serve a checkpoint by OpenAI's protocol until SIGTERM or Ctrl-C.

    Args:
        checkpoint: folder or hub id, with a tokenizer.
        host, port: where to listen; port 0 takes a free one.
        name: of the model in requests; the folder's by default.
        api_key: what requests must carry; None lets everyone in.
        max_rows, max_tokens: requests that run at a time, and the room for their keys and values; see `Engine`.
        max_prompt_tokens, max_new_tokens, max_num_steps, max_body_bytes, max_queue, max_seconds: what is accepted, see
            `Limits`, which has the defaults.
        drain_seconds: how long answers under way may take when the server is told to end.
        replicas: how many processes serve, each with a model of its own; more than one run under Ray Serve.
        on_start: called with (model's name, address) when the server takes requests.

    Raises:
        RedepthError: for a checkpoint, address or number that does not fit, and where the extra `serve`, or `ray` for
            replicas, is not installed.
    """
    from redepth.runtime import choose_device, require

    for package in ("fastapi", "uvicorn", "prometheus_client"):
        require(package, "serve")
    if replicas < 1:
        raise RedepthError(f"--replicas is {replicas}; give 1 or more")
    for limit, value in (("max_rows", max_rows), ("max_tokens", max_tokens)):
        if value < 1:
            raise RedepthError(f"{limit} must be at least 1, got {value}")
    if replicas > 1:
        require("ray", "ray")
    from redepth.serving.limits import limits_from
    from redepth.serving.served import Served
    from redepth.serving.server import serve as run
    from redepth.serving.sockets import address, listen

    allowed = limits_from(
        prompt_tokens=max_prompt_tokens,
        new_tokens=max_new_tokens,
        num_steps=max_num_steps,
        body_bytes=max_body_bytes,
        queue=max_queue,
        seconds=max_seconds,
    )
    taken = listen(host, port)
    start = on_start or (lambda called, where: None)
    try:
        if replicas > 1:
            from redepth.serving import replicas as ray_serve

            asked = ray_serve.Replicas(
                checkpoint=str(checkpoint),
                replicas=replicas,
                name=name,
                api_key=api_key,
                max_rows=max_rows,
                max_tokens=max_tokens,
                drain_seconds=drain_seconds,
                dtype=dtype,
                device=str(device),
                limits=allowed,
            )
            ray_serve.run(asked, taken, start)
            return
        served = Served.load(
            checkpoint,
            allowed,
            name=name,
            max_rows=max_rows,
            max_tokens=max_tokens,
            dtype=dtype,
            device=choose_device(device),
        )
        run(
            served,
            taken,
            api_key=api_key,
            drain_seconds=drain_seconds,
            on_start=lambda: start(served.name, address(taken)),
        )
    finally:
        taken.close()


def play(
    checkpoint: str | Path,
    other: str | Path | None = None,
    *,
    host: str = LOOPBACK,
    port: int = 7860,
    max_rows: int = MAX_ROWS,
    max_tokens: int = MAX_TOKENS,
    max_num_steps: int | None = None,
    dtype: str = "auto",
    device: "str | torch.device" = "auto",
    on_start: Callable[[str], Any] | None = None,
) -> None:
    """A page on which to try a checkpoint at any depth, or two side by side, until Ctrl-C.

    Args:
        checkpoint, other: folders or hub ids, with tokenizers.
        host, port: where to listen; port 0 takes a free one.
        max_rows, max_tokens: of each model's engine; see `Engine`.
        max_num_steps: where the depth sliders end.
        on_start: called with the address when the page can be opened.

    Raises:
        RedepthError: for a checkpoint, address or number that does not fit, and where the extra `play` is not installed.
    """
    from redepth.runtime import choose_device, require

    require("gradio", "play")
    from redepth.playground.page import free_port, launch
    from redepth.serving.limits import limits_from
    from redepth.serving.served import Served, usual_name

    allowed = limits_from(num_steps=max_num_steps)
    chosen = free_port(host, port)
    models: list[Served] = []
    for number, each in enumerate([checkpoint] if other is None else [checkpoint, other]):
        name = usual_name(each)
        # Two of one name are told apart by their places.
        called = name if name not in [served.name for served in models] else f"{name} ({number + 1})"
        models.append(
            Served.load(
                each,
                allowed,
                name=called,
                max_rows=max_rows,
                max_tokens=max_tokens,
                dtype=dtype,
                device=choose_device(device),
            )
        )
    launch(models, host, chosen, on_start=on_start)
