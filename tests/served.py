"""A tiny random model behind a real server on a free port, for tests that talk to it from outside."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from redepth.serving.app import create_app
from redepth.serving.engine import Engine
from redepth.serving.limits import Limits
from redepth.serving.runner import Runner
from redepth.serving.served import Served
from redepth.serving.sockets import address, listen
from redepth.surgery.convert import plan_conversion
from tests.test_healing import byte_tokenizer

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"


def tiny_model(zoo: dict[str, Path]) -> Any:
    """A random model whose state moves from step to step, so that every depth says something else; it never ends by itself."""
    model: Any = plan_conversion(zoo["qwen3"], "0:2", "2:4", "4:6", adapter="random", state="noise").model()
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    return model


def make_served(model: Any, *, engine: Any = None, limits: dict[str, Any] | None = None, name: str = "tiny") -> Served:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    allowed = Limits(**limits or {})
    engine = engine or Engine(model, max_rows=4, max_tokens=2048)
    return Served(name, name, model, tokenizer, Runner(engine, allowed), allowed)


@contextmanager
def running(served: Served, api_key: str | None = None) -> Iterator[str]:
    """The server's address; it is drained at the end of the block."""
    taken = listen("127.0.0.1", 0)
    server = uvicorn.Server(
        uvicorn.Config(create_app(served, api_key), log_level="warning", timeout_graceful_shutdown=5)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield address(taken)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def wait_until(true: Any, seconds: float = 20.0) -> None:
    """Raises AssertionError where it does not become true in time."""
    ends = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.01)
