"""What a server or page accepts, and how it says no."""

from dataclasses import dataclass, fields
from typing import Any

from redepth.errors import RedepthError

INVALID = "invalid_request_error"
MAX_ROWS = 16
MAX_TOKENS = 16384
DRAIN_SECONDS = 30.0


@dataclass(frozen=True)
class Limits:
    """The most that is accepted.

    Attributes:
        prompt_tokens: of one prompt; what the model has room for where it is more.
        new_tokens: of one answer.
        num_steps: of one token.
        body_bytes: of a request's body.
        queue: requests that wait for a row.
        seconds: from a request's arrival to its last token.
    """

    prompt_tokens: int = 8192
    new_tokens: int = 4096
    num_steps: int = 64
    body_bytes: int = 1 << 20
    queue: int = 64
    seconds: float = 600.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise RedepthError(f"the limit on {field.name} must be above 0, got {value}")


def limits_from(**given: Any) -> Limits:
    """The limits of these names; None leaves one at its default."""
    return Limits(**{name: value for name, value in given.items() if value is not None})


class Refusal(Exception):
    """A request that gets no answer, or no more of it, in the protocol's form.

    Attributes:
        status: of HTTP.
        kind: the protocol's `type`.
        code: a word for programs.
        param: the field of the request that it is about.
    """

    def __init__(
        self, message: str, status: int = 400, kind: str = INVALID, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.code, self.param = status, kind, code, param

    def body(self) -> dict[str, dict[str, str | None]]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def overloaded(limit: int) -> Refusal:
    message = f"{limit} requests are waiting, which is the most that this server lets wait; try again later"
    return Refusal(message, 429, "rate_limit_error", "queue_full")


def timed_out(seconds: float) -> Refusal:
    message = f"the answer was not complete after {seconds:g} s, the most that this server takes; ask for fewer tokens or steps"
    return Refusal(message, 504, "timeout_error", "timeout")


def failed(error: BaseException) -> Refusal:
    """A fault while a request ran; what it says inside stays in the server's log."""
    return Refusal(
        f"this request failed inside the server: {type(error).__name__}", 500, "server_error", "internal_error"
    )


def closing() -> Refusal:
    return Refusal(
        "this server is shutting down; ask another one, or again later", 503, "server_error", "shutting_down"
    )
