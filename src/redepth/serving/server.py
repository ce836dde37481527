"""The app on a port, until it is told to end."""

import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from redepth.errors import RedepthError

from .app import create_app
from .served import Served


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections; port 0 takes a free one.

    Raises:
        RedepthError: where the address can't be had.
    """
    if not 0 <= port <= 65535:
        raise RedepthError(f"--port {port} is none; give one from 0 to 65535")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise RedepthError(
            f"can't listen on {host}:{port}: {error.strerror or error}; give another --host or --port"
        ) from None


def address(taken: socket.socket) -> str:
    """Where a socket is found, as http://host:port."""
    host, port = taken.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


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
