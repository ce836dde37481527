"""The app on a port, until it is told to end."""

import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from .app import create_app
from .served import Served


def serve(
    served: Served, taken: socket.socket, *, api_key: str | None, drain_seconds: float, on_start: Callable[[], Any]
) -> None:
    """Run the app until SIGTERM or Ctrl-C: no new connections then, and `drain_seconds` for the answers under way."""
    config = uvicorn.Config(
        create_app(served, api_key),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(drain_seconds)),
    )
    # uvicorn raises the signal again when it has ended; a drained server has done what it was told.
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        on_start()
        uvicorn.Server(config).run(sockets=[taken])
    finally:
        signal.signal(signal.SIGTERM, before)
        taken.close()
