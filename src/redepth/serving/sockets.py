"""Where to listen."""

import socket

from redepth.errors import RedepthError


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
