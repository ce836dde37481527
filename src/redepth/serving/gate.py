"""What every request passes before the app: the key, and a body that is not too large and does come."""

import asyncio
import hmac
import json
from typing import Any

from .limits import INVALID, Limits, Refusal

OPEN_PATHS = ("/health", "/ready")
# A body that is too large is read on for so many times the limit, so that its sender hears why.
READ_ON = 8


class Gate:
    """ASGI middleware. The app behind it gets the body in one piece.

    Args:
        api_key: what `Authorization: Bearer` must carry; None lets everyone in.
    """

    def __init__(self, app: Any, limits: Limits, api_key: str | None = None) -> None:
        self.app, self.limits = app, limits
        self.api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            headers = dict(scope["headers"])
            if scope["path"] not in OPEN_PATHS:
                self._check_key(headers.get(b"authorization", b""))
            body = await self._read(receive)
        except Refusal as refusal:
            await _send(send, refusal)
            return
        except ConnectionError:
            return  # nobody is there to be told
        given = False

        async def replay() -> Any:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    def _check_key(self, header: bytes) -> None:
        scheme, _, key = header.partition(b" ")
        if self.api_key is not None and not (scheme.lower() == b"bearer" and hmac.compare_digest(key, self.api_key)):
            raise Refusal("the API key is missing or wrong", 401, INVALID, "invalid_api_key")

    async def _read(self, receive: Any) -> bytes:
        most = self.limits.body_bytes
        parts, size, more = [], 0, True
        try:
            async with asyncio.timeout(self.limits.seconds):
                while more and size <= most * READ_ON:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ConnectionError("the client went away")
                    part, more = message.get("body", b""), message.get("more_body", False)
                    size += len(part)
                    if size <= most:
                        parts.append(part)
        except TimeoutError:
            message = f"the request's body did not arrive within {self.limits.seconds:g} s"
            raise Refusal(message, 408, "timeout_error", "timeout") from None
        if size > most:
            raise Refusal(f"the request's body is larger than {most} bytes; send less", 413, INVALID, "body_too_large")
        return b"".join(parts)


async def _send(send: Any, refusal: Refusal) -> None:
    body = json.dumps(refusal.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
