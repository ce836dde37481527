"""Verbs that answer others: a server, and a page."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LOOPBACK = "127.0.0.1"
MAX_ROWS = 16
MAX_TOKENS = 16384
DRAIN_SECONDS = 30.0


def serve(
    checkpoint: str | Path,
    *,
    host: str = LOOPBACK,
    port: int = 8000,
    name: str | None = None,
    api_key: str | None = None,
    max_rows: int = MAX_ROWS,
    max_tokens: int = MAX_TOKENS,
    limits: dict[str, Any] | None = None,
    drain_seconds: float = DRAIN_SECONDS,
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
        limits: what is accepted, by the names of `Limits`.
        drain_seconds: how long answers under way may take when the server is told to end.
        on_start: called with (model's name, address) when the server takes requests.

    Raises:
        RedepthError: for a checkpoint, address or number that does not fit, and where the extra `serve` is not installed.
    """
    from redepth.runtime import choose_device, require

    for package in ("fastapi", "uvicorn", "prometheus_client"):
        require(package, "serve")
    from redepth.serving.limits import Limits
    from redepth.serving.served import Served
    from redepth.serving.server import address, listen
    from redepth.serving.server import serve as run

    allowed = Limits(**limits or {})
    taken = listen(host, port)
    try:
        served = Served.load(
            checkpoint,
            allowed,
            name=name,
            max_rows=max_rows,
            max_tokens=max_tokens,
            dtype=dtype,
            device=choose_device(device),
        )
        start = on_start or (lambda called, where: None)
        run(
            served,
            taken,
            api_key=api_key,
            drain_seconds=drain_seconds,
            on_start=lambda: start(served.name, address(taken)),
        )
    finally:
        taken.close()
