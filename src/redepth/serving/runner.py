"""One thread that owns the engine and ticks it; everyone else hands it requests and is told what comes of them."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from redepth.modeling import DepthPolicy

from .limits import Limits, Refusal, closing, failed, overloaded
from .request import FinishReason, Request, Sampling, Token

logger = logging.getLogger(__name__)
# Ticks in a row that may fail before the engine counts as broken.
MOST_FAULTS = 3


class Event(NamedTuple):
    """What a tick did for a request.

    Attributes:
        finish: why the request has ended; None while it goes on.
        error: what went wrong, where `finish` is `error`.
    """

    token: Token | None
    finish: FinishReason | None
    error: str | None


Listener = Callable[[Event], None]


class Runner:
    """Ticks an engine in a thread of its own while there is work.

    Args:
        engine: `submit`, `cancel`, `step` and `has_work` as `Engine` has them.
        limits: of which `queue` is kept here.
    """

    def __init__(self, engine: Any, limits: Limits | None = None) -> None:
        self.engine = engine
        self.limits = limits or Limits()
        self.faults = 0
        self._listeners: dict[Request, Listener] = {}
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self._faults_in_a_row = 0
        self._thread = threading.Thread(target=self._run, name="redepth-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self.is_alive and not self._is_closing

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs and the engine is not broken."""
        return self._thread.is_alive() and self._faults_in_a_row < MOST_FAULTS

    def submit(self, prompt: Sequence[int], policy: DepthPolicy, sampling: Sampling, listen: Listener) -> Request:
        """Queue a request; from any thread.

        Args:
            listen: called from the engine's thread with every event of the request; it must not block.

        Raises:
            Refusal: where too many requests wait, or the runner is closing or broken.
            ValueError: as `Engine.submit`.
        """
        with self._changed:
            if not self.is_ready:
                raise closing()
            if self.engine.waiting >= self.limits.queue:
                raise overloaded(self.limits.queue)
            # Under the lock, which the thread takes before it tells what came of a tick.
            request = self.engine.submit(prompt, policy, sampling)
            self._listeners[request] = listen
            self._changed.notify()
        return request

    def cancel(self, request: Request) -> None:
        """End a request and forget who listens; nothing happens to one that has ended."""
        with self._changed:
            if self._listeners.pop(request, None) is not None:
                self.engine.cancel(request)
                self._changed.notify()

    def between_ticks(self, job: Callable[[], Any]) -> "Future[Any]":
        """Run something with the model while no request is in a pass; from any thread.

        Raises:
            Refusal: where the runner is closing or broken.
        """
        result: Future[Any] = Future()
        with self._changed:
            if not self.is_ready:
                raise closing()
            self._jobs.append((job, result))
            self._changed.notify()
        return result

    def close(self, wait: float = 5.0) -> None:
        """Take no more requests, end those that run, and wait for the thread."""
        with self._changed:
            self._is_closing = True
            requests = list(self._listeners)
            self._changed.notify()
        self._tell_failure(requests, closing())
        if self._thread.is_alive():
            self._thread.join(wait)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self.engine.has_work or self._is_closing)
                if self._is_closing:
                    jobs, self._jobs = self._jobs, deque()
                    break
                job = self._jobs.popleft() if self._jobs else None
            if job is not None:
                self._do(*job)
            if self.engine.has_work:
                self._tick()
        for _, result in jobs:
            result.cancel()

    def _do(self, job: Callable[[], Any], result: "Future[Any]") -> None:
        if result.set_running_or_notify_cancel():
            try:
                result.set_result(job())
            except Exception as error:
                result.set_exception(error)

    def _tick(self) -> None:
        try:
            updates = self.engine.step()
        except Exception as error:
            # Whose fault it is can't be told: those in flight end, and the next ones get an engine without them.
            logger.exception("a tick of the engine failed")
            self.faults += 1
            self._faults_in_a_row += 1
            with self._changed:
                requests = list(self._listeners)
            self._tell_failure(requests, failed(error))
            return
        self._faults_in_a_row = 0
        last = {update.request: number for number, update in enumerate(updates)}
        for number, (request, token) in enumerate(updates):
            # Read here, since the engine goes on while others read what they were told.
            has_ended = request.is_finished and last[request] == number
            event = Event(token, request.finish_reason if has_ended else None, request.error if has_ended else None)
            self._tell(request, event)

    def _tell(self, request: Request, event: Event) -> None:
        with self._changed:
            listen = self._listeners.get(request)
            if event.finish is not None:
                self._listeners.pop(request, None)
        if listen is None:
            return
        try:
            listen(event)
        except Exception:
            # Such as an event loop that is closed.
            logger.exception("the listener of a request failed; the request ends")
            self.cancel(request)

    def _tell_failure(self, requests: list[Request], why: Refusal) -> None:
        for request in requests:
            self.engine.cancel(request)
            self._tell(request, Event(None, "error", str(why)))
