"""Answers as they come: the events of one request, or of several side by side, as pieces of text with their tokens."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from redepth.modeling import DepthPolicy

from .limits import INVALID, Refusal, timed_out
from .request import Request, Sampling, Token
from .runner import Event
from .served import Served
from .stops import TextStream


@dataclass(frozen=True)
class Piece:
    """Text that is certain, and the tokens that were taken since the last piece.

    Attributes:
        finish: `stop` or `length` in the last piece of an answer, else None.
    """

    text: str
    tokens: tuple[Token, ...]
    finish: Any = None


@dataclass
class Answer:
    """One answer in the making.

    Attributes:
        tokens: all tokens taken so far; one that ends the answer without text is the last of them.
        finish: why it ended; None while it goes on.
    """

    prompt: list[int]
    policy: DepthPolicy
    sampling: Sampling
    text: TextStream
    tokens: list[Token] = field(default_factory=list)
    finish: Any = None
    request: Request | None = None
    _waiting: list[Token] = field(default_factory=list)

    @property
    def steps(self) -> list[int]:
        return [token.steps for token in self.tokens]

    def take(self, event: Event) -> Piece | None:
        """What an event adds; None where no text is certain yet.

        Raises:
            Refusal: where the engine gave the request up.
        """
        if self.finish is not None:
            return None
        if event.finish in ("error", "cancelled"):
            message = event.error or "the request was cancelled"
            raise Refusal(f"this request failed: {message}", 500, "server_error", "request_failed")
        said = ""
        if event.token is not None:
            self.tokens.append(event.token)
            self._waiting.append(event.token)
            said = self.text.put(event.token.id)
        self.finish = "stop" if self.text.stopped_by is not None else event.finish
        if self.finish is not None:
            said += self.text.end()
        if not said and self.finish is None:
            return None
        piece = Piece(said, tuple(self._waiting), self.finish)
        self._waiting = []
        return piece


class Batch:
    """Answers that are made side by side, of one model or of several, for one asker.

    Used as `async for number, piece in batch.pieces()`; leaving it early, in whatever way, frees the rows.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.answers: list[Answer] = []
        self._runners: list[Any] = []
        self._loop = asyncio.get_running_loop()
        self._ends_at = self._loop.time() + seconds
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def add(
        self,
        served: Served,
        prompt: Sequence[int],
        policy: DepthPolicy,
        sampling: Sampling,
        stops: tuple[str, ...] = (),
        *,
        continues: bool,
    ) -> Answer:
        """Submit one more; where that is refused, those that were added before are ended.

        Args:
            continues: whether the answer goes on in the prompt's text, and does not begin one of its own.

        Raises:
            Refusal: as `Runner.submit`.
        """
        answer = Answer(
            list(prompt), policy, sampling, TextStream(served.tokenizer, stops, prompt if continues else ())
        )
        try:
            answer.request = served.runner.submit(prompt, policy, sampling, self._listener(len(self.answers)))
        except ValueError as error:
            self.end()
            raise Refusal(str(error), kind=INVALID) from None
        except Refusal:
            self.end()
            raise
        self.answers.append(answer)
        self._runners.append(served.runner)
        return answer

    def _listener(self, number: int) -> Callable[[Event], None]:
        def listen(event: Event) -> None:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

        return listen

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(number of the answer, piece) as they come, until all have ended.

        Raises:
            Refusal: where time is up, or an answer failed; the others are ended too.
        """
        try:
            while any(answer.finish is None for answer in self.answers):
                try:
                    async with asyncio.timeout_at(self._ends_at):
                        number, event = await self._events.get()
                except TimeoutError:
                    raise timed_out(self.seconds) from None
                answer = self.answers[number]
                piece = answer.take(event)
                if answer.finish is not None and event.finish is None:
                    self._cancel(number)  # a stop string: the engine does not know of it
                if piece is not None:
                    yield number, piece
        finally:
            self.end()

    def end(self) -> None:
        """Free the rows of those that still run."""
        for number in range(len(self.answers)):
            self._cancel(number)

    def _cancel(self, number: int) -> None:
        request = self.answers[number].request
        if request is not None:
            self._runners[number].cancel(request)
