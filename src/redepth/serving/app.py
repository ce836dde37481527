"""OpenAI's protocol over a served model, as a FastAPI app."""

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from . import protocol
from .answers import Batch
from .forms import ChatForm, CompletionForm, Form
from .gate import Gate
from .limits import INVALID, Refusal, failed
from .metrics import Metrics, Watch
from .request import Sampling
from .served import Served

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

CLIENT_GONE = 499  # as nginx counts them; nobody reads it
SAID_BY_STATUS = {
    400: "The request is wrong.",
    401: "The API key is missing or wrong.",
    404: "There is no such model or path.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    429: "Too many requests wait.",
    500: "The request failed.",
    503: "The server is shutting down.",
    504: "The answer took too long.",
}
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": protocol.ErrorBody, "description": says} for status, says in SAID_BY_STATUS.items()
}
STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}


class EventStream(StreamingResponse):
    """A stream whose rows are freed however it ends, even before its first byte."""

    media_type = "text/event-stream"

    def __init__(self, batch: Batch, content: AsyncIterator[str]) -> None:
        super().__init__(content, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self.batch = batch

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.batch.end()


def create_app(served: Served, api_key: str | None = None) -> FastAPI:
    """The app; its runner starts and ends with it.

    Args:
        api_key: what requests must carry; None lets everyone in.
    """
    metrics = Metrics(served.runner)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        served.runner.start()
        yield
        served.runner.close()

    app = FastAPI(title="redepth", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.runner = served.runner
    app.add_middleware(Gate, limits=served.limits, api_key=api_key)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _fault)
    model = protocol.Model(id=served.name, created=0)

    @app.get("/health", responses={503: {"description": "The engine has failed; start the server anew."}})
    async def health(response: Response) -> dict[str, str]:
        if not served.runner.is_alive:
            response.status_code = 503
            return {"status": "broken"}
        return {"status": "ok"}

    @app.get("/ready", responses={503: {"description": "No requests are taken."}})
    async def ready(response: Response) -> dict[str, str]:
        if not served.runner.is_ready:
            response.status_code = 503
            return {"status": "not ready"}
        return {"status": "ready"}

    @app.get("/metrics", responses={401: REFUSALS[401]}, response_class=Response)
    async def metrics_page() -> Response:
        return Response(metrics.page(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", responses={401: REFUSALS[401]})
    async def models() -> protocol.ModelList:
        return protocol.ModelList(data=[model])

    @app.get("/v1/models/{name:path}", responses={status: REFUSALS[status] for status in (401, 404)})
    async def one_model(name: str) -> protocol.Model:
        check_model(name)
        return model

    @app.post("/v1/chat/completions", responses=REFUSALS | STREAM, response_model=protocol.ChatCompletion)
    async def chat_completions(body: protocol.ChatAsked, request: Request) -> Any:
        check_model(body.model)
        prompts = [served.render([message.for_template() for message in body.messages])]
        return await answer(ChatForm, body, prompts, request)

    @app.post("/v1/completions", responses=REFUSALS | STREAM, response_model=protocol.Completion)
    async def completions(body: protocol.CompletionAsked, request: Request) -> Any:
        check_model(body.model)
        prompts = [
            served.encode(prompt) if isinstance(prompt, str) else served.check_prompt(prompt) for prompt in body.prompts
        ]
        return await answer(CompletionForm, body, prompts, request)

    def check_model(name: str) -> None:
        if name != served.name:
            message = f"there is no model {name[:200]!r}; this server has {served.name!r}"
            raise Refusal(message, 404, INVALID, "model_not_found", "model")

    def submitted(body: protocol.Asked, prompts: list[list[int]]) -> Batch:
        """All answers of a request, queued or refused together."""
        choices = body.n or 1
        if len(prompts) * choices > served.limits.queue:
            message = f"{len(prompts)} prompts with n={choices} are more than the {served.limits.queue} that may wait"
            raise Refusal(message, param="prompt")
        if body.stream_options is not None and not body.stream:
            raise Refusal("stream_options needs stream=true", param="stream_options")
        policy = served.policy(**body.policy_keywords())
        named, most = body.most_tokens
        seed = secrets.randbits(32) if body.seed is None else body.seed
        batch = Batch(served.limits.seconds)
        for prompt in prompts:
            for choice in range(choices):
                sampling = Sampling(
                    max_new_tokens=served.room_for(prompt, most, body.usual_tokens, named),
                    temperature=1.0 if body.temperature is None else body.temperature,
                    top_p=1.0 if body.top_p is None else body.top_p,
                    seed=(seed + choice) % 2**32,
                    logprobs=body.most_likely,
                )
                batch.add(served, prompt, policy, sampling, body.stops, continues=body.continues_text)
        return batch

    async def answer(form_class: type[Form], body: protocol.Asked, prompts: list[list[int]], request: Request) -> Any:
        route = request.url.path
        try:
            batch = submitted(body, prompts)
        except Refusal as refusal:
            metrics.answers.labels(route, refusal.code or "refused").inc()
            raise
        form = form_class(
            model=served.name,
            tokenizer=served.tokenizer,
            answers=batch.answers,
            ignored=body.ignored,
            prompt_tokens=sum(map(len, prompts)),
            most_likely=body.most_likely,
        )
        followed = follow(batch, route)
        if body.stream:
            with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            return EventStream(batch, events(form, followed, with_usage))

        async def whole() -> Any:
            async for _ in followed:
                pass
            return form.whole()

        return await unless_gone(request, whole())

    async def follow(batch: Batch, route: str) -> AsyncIterator[tuple[int, Any]]:
        """The pieces of a batch, counted."""
        watch, outcome = Watch(metrics), "client_gone"
        try:
            async for number, piece in batch.pieces():
                watch.see(number, piece.tokens)
                yield number, piece
            outcome = "ok"
        except Refusal as refusal:
            outcome = refusal.code or "refused"
            raise
        finally:
            batch.end()
            metrics.answers.labels(route, outcome).inc()

    return app


async def events(form: Form, pieces: AsyncIterator[tuple[int, Any]], with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events; a fault on the way is the last of them."""
    try:
        for chunk in form.opening():
            yield _event(chunk.model_dump_json())
        async for number, piece in pieces:
            yield _event(form.chunk(number, piece).model_dump_json())
        if with_usage:
            yield _event(form.last_usage().model_dump_json())
    except Refusal as refusal:
        yield _event(json.dumps(refusal.body()))
    except Exception as error:
        logger.exception("a stream failed")
        yield _event(json.dumps(failed(error).body()))
    yield _event("[DONE]")


def _event(data: str) -> str:
    return f"data: {data}\n\n"


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result | Response:
    """What the work comes to; it is cancelled when the client goes away."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        return Response(status_code=CLIENT_GONE)
    finally:
        for task in (working, watching):
            task.cancel()
            with suppress(asyncio.CancelledError, Refusal):
                await task


def _refused(request: Request, refusal: Any) -> JSONResponse:
    return JSONResponse(refusal.body(), refusal.status, {"retry-after": "1"} if refusal.status in (429, 503) else None)


def _invalid(request: Request, error: Any) -> JSONResponse:
    """The first thing that is wrong with a body."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:] if isinstance(part, int) or part.isidentifier())
    message = first["msg"].removeprefix("Value error, ")
    said = f"{place}: {message}" if place else message
    return _refused(request, Refusal(said, param=place or None))


def _http_error(request: Request, error: Any) -> JSONResponse:
    refusal = Refusal(str(error.detail), error.status_code)
    return JSONResponse(refusal.body(), error.status_code, error.headers)


def _fault(request: Request, error: Exception) -> JSONResponse:
    return _refused(request, failed(error))
