"""Two replicas under Ray Serve on this machine: one is killed under load, all are restarted, and the server is told to end."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from redepth.serving.sockets import listen
from tests.served import TEMPLATE, tiny_model, wait_until
from tests.test_healing import byte_tokenizer

pytestmark = pytest.mark.slow
PROMPTS = ["Depth is ", "a", "one two three", "replicas"]
ASKED: dict[str, Any] = {"model": "tiny", "max_tokens": 40, "temperature": 0, "extra_body": {"num_steps": 16}}


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    url: str

    @property
    def client(self) -> Any:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def replicas(self) -> set[int]:
        """Process ids of the replicas, of which there may be more or fewer than were asked for, for a while."""
        parents, named = {}, set()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if b"ServeReplica" in (folder / "cmdline").read_bytes():
                    named.add(int(folder.name))
            except OSError:
                continue

        def is_ours(process: int) -> bool:
            return process == self.process.pid or (process in parents and is_ours(parents[process]))

        return {process for process in named if is_ours(process)}

    def answers(self, path: str) -> bool:
        try:
            return httpx.get(f"{self.url}{path}", timeout=10).status_code == 200
        except httpx.TransportError:
            return False


@pytest.fixture(scope="module")
def server(zoo, tmp_path_factory) -> Iterator[Server]:
    pytest.importorskip("ray.serve")
    folder = tmp_path_factory.mktemp("replicas") / "tiny"
    tiny_model(zoo).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "redepth", "serve", str(folder), "--replicas", "2", "--port", str(port)]
    process = subprocess.Popen(words)
    running = Server(process, f"http://127.0.0.1:{port}")
    try:
        wait_until(lambda: process.poll() is not None or running.answers("/ready"), 300)
        yield running
    finally:
        process.terminate()
        assert process.wait(90) == 0
    wait_until(lambda: not running.replicas())


@pytest.fixture(scope="module")
def alone(server: Server) -> dict[str, str]:
    return {prompt: server.client.completions.create(prompt=prompt, **ASKED).choices[0].text for prompt in PROMPTS}


@dataclass
class Asked:
    """One request of the load: when it was sent, when it ended, and with what."""

    prompt: str
    sent: float
    ended: float = float("inf")
    text: str | None = None


@contextmanager
def load(server: Server, clients: int = 8) -> Iterator[list[Asked]]:
    """Clients that ask one thing after another, every other one as a stream; what they asked so far."""
    requests: list[Asked] = []
    stop = threading.Event()

    def ask(number: int) -> None:
        client = server.client
        while not stop.is_set():
            one = Asked(PROMPTS[number % len(PROMPTS)], time.monotonic())
            requests.append(one)
            try:
                if number % 2:
                    one.text = client.completions.create(prompt=one.prompt, **ASKED).choices[0].text
                else:
                    choices = [
                        each.choices[0] for each in client.completions.create(prompt=one.prompt, stream=True, **ASKED)
                    ]
                    if choices and choices[-1].finish_reason:
                        one.text = "".join(each.text for each in choices)
            except (openai.APIError, httpx.TransportError):
                pass
            one.ended = time.monotonic()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield requests
    finally:
        stop.set()
        for thread in threads:
            thread.join(120)
    assert not any(thread.is_alive() for thread in threads)


def more_answers(requests: list[Asked], number: int) -> None:
    before = sum(one.text is not None for one in requests)
    wait_until(lambda: sum(one.text is not None for one in requests) >= before + number, 300)


def test_two_replicas_answer_as_one_server(server: Server, alone: dict[str, str]) -> None:
    assert len(server.replicas()) == 2
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert [each.id for each in server.client.models.list()] == ["tiny"]
    with load(server) as requests:
        more_answers(requests, 16)
    assert all(one.text == alone[one.prompt] for one in requests)
    wrong = httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "a", "num_steps": 0})
    assert wrong.status_code == 400 and "num_steps" in wrong.json()["error"]["message"]


def test_a_replica_that_is_killed_takes_only_what_it_held(server: Server, alone: dict[str, str]) -> None:
    before = server.replicas()
    with load(server) as requests:
        more_answers(requests, 8)
        killed = before.copy().pop()
        os.kill(killed, signal.SIGKILL)
        at = time.monotonic()
        wait_until(lambda: len(server.replicas() - {killed}) == 2, 300)
        more_answers(requests, 16)
    lost = [one for one in requests if one.text is None]
    held = [one for one in requests if one.sent <= at < one.ended]
    assert all(one in held for one in lost)
    assert 0 < len(lost) < len(held)
    assert all(one.text == alone[one.prompt] for one in requests if one.text is not None)
    for one in lost:
        assert server.client.completions.create(prompt=one.prompt, **ASKED).choices[0].text == alone[one.prompt]
    assert len(server.replicas() & before) == 1


def test_a_rolling_restart_loses_nothing(server: Server, alone: dict[str, str]) -> None:
    before = server.replicas()
    with load(server) as requests:
        more_answers(requests, 8)
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: len(server.replicas()) == 2 and not server.replicas() & before, 300)
        more_answers(requests, 16)
    assert all(one.text == alone[one.prompt] for one in requests)


def test_a_client_that_goes_away_frees_its_row(server: Server) -> None:
    def pages() -> str:
        """What the replicas count; each page is one of theirs."""
        return "".join(httpx.get(f"{server.url}/metrics", timeout=60).text for _ in range(8))

    stream = server.client.completions.create(
        prompt="a", stream=True, **ASKED | {"max_tokens": 100, "extra_body": {"num_steps": 64}}
    )
    next(stream)
    stream.close()
    wait_until(lambda: 'redepth_answers_total{outcome="client_gone"' in pages(), 60)
    assert "redepth_rows_running 1.0" not in pages()


def test_the_end_drains(server: Server, alone: dict[str, str]) -> None:
    stream = server.client.completions.create(prompt="a", stream=True, **ASKED)
    choices = [next(stream).choices[0]]
    server.process.terminate()
    choices += [chunk.choices[0] for chunk in stream]
    assert "".join(each.text for each in choices) == alone["a"]
    assert choices[-1].finish_reason == "length"
    assert server.process.wait(90) == 0
