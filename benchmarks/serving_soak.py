"""A server under mixed load for a while: every answer is compared with what the same request gave alone.

Starts `redepth serve` on a tiny random model (or OUT), asks every one of REQUESTS alone, and then lets many clients ask
them at once, at mixed depths, beside requests that are given up half-way and requests that are wrong. Prints what was
dropped, mixed up or wrongly refused, and the server's memory by the minute; exits with 1 where anything was, or where
memory grew.

    python benchmarks/serving_soak.py --minutes 20
"""

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import openai
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import redepth

NAME = "soaked"
POLICIES: list[dict[str, Any]] = [
    {"num_steps": 1},
    {"num_steps": 4},
    {"num_steps": 16},
    {"num_steps": 32},
    {"num_steps": 16, "criterion": "latent-diff", "exit_threshold": 0.2},
    {"num_steps": 32, "criterion": "kl", "exit_threshold": 0.01, "min_steps": 2},
]
PROMPTS = ["a", "The capital of France is", "depth " * 12, "one two three four five six seven"]
# Everything but the model; a seed makes a sampled answer repeatable.
REQUESTS: list[dict[str, Any]] = [
    {"prompt": prompt, "max_tokens": 8 + 5 * (number % 5), "temperature": 0.9 * (number % 2), "seed": number, **more}
    for number, (prompt, more) in enumerate((prompt, policy) for prompt in PROMPTS for policy in POLICIES)
]
MISTAKES: list[dict[str, Any]] = [
    {"num_steps": 0},
    {"num_step": 3},
    {"max_tokens": -1},
    {"prompt": ""},
    {"criterion": "no"},
]
WARM_MINUTES = 2.0
MOST_GROWTH = 0.05  # of the memory after WARM_MINUTES


def make_model(folder: Path) -> Path:
    """A small random checkpoint with a tokenizer of single letters."""
    letters = {chr(32 + number): number + 3 for number in range(95)}
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, **letters, "?!": 98}, unk_token="?!"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(folder / "words")
    size = {"n_embd": 32, "n_heads": 4, "num_key_value_heads": 4, "intermediate_size": 48, "block_size": 256}
    redepth.create(folder / "model", "nano", tokenizer=folder / "words", seed=1, **size)
    return folder / "model"


def start(checkpoint: Path | str) -> tuple[subprocess.Popen[bytes], str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["serve", str(checkpoint), "--port", str(port), "--name", NAME, "--max-queue", "512"]
    return subprocess.Popen([sys.executable, "-m", "redepth", *words]), f"http://127.0.0.1:{port}"


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    sys.exit("the server ended before it was ready")


def memory_mb(process: subprocess.Popen[bytes]) -> float:
    """What the server holds in memory."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def body_of(request: dict[str, Any]) -> dict[str, Any]:
    extra = {
        name: request[name] for name in request if name in ("num_steps", "criterion", "exit_threshold", "min_steps")
    }
    return {name: value for name, value in request.items() if name not in extra} | {"model": NAME, "extra_body": extra}


class Soak:
    """The clients, what each request gave alone, and what happened since."""

    def __init__(self, client: openai.AsyncOpenAI, url: str) -> None:
        self.client, self.url = client, url
        self.alone: list[tuple[str, list[int]]] = []
        self.happened: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def ask_alone(self) -> None:
        for request in REQUESTS:
            choice = (await self.client.completions.create(**body_of(request))).choices[0]
            self.alone.append((choice.text, choice.steps))  # type: ignore[attr-defined]

    async def client_until(self, ends: float, seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < ends:
            number = chance.randrange(len(REQUESTS))
            kind = chance.choices(("stream", "whole", "given up", "mistake"), (70, 10, 10, 10))[0]
            try:
                await {"stream": self.stream, "whole": self.whole, "given up": self.give_up, "mistake": self.mistake}[
                    kind
                ](number, chance)
            except Exception as error:
                self.wrong.append(f"{kind} {number}: {type(error).__name__}: {error}")
            self.happened[kind] += 1

    async def stream(self, number: int, chance: random.Random) -> None:
        text, steps, finish = "", [], None
        async for chunk in await self.client.completions.create(stream=True, **body_of(REQUESTS[number])):
            choice: Any = chunk.choices[0]
            text, finish = text + choice.text, choice.finish_reason
            steps += choice.steps
        if finish is None:
            self.wrong.append(f"stream {number} was dropped after {text!r}")
        self.compare(number, text, steps)

    async def whole(self, number: int, chance: random.Random) -> None:
        choice: Any = (await self.client.completions.create(**body_of(REQUESTS[number]))).choices[0]
        self.compare(number, choice.text, choice.steps)

    def compare(self, number: int, text: str, steps: list[int]) -> None:
        self.happened["tokens"] += len(steps)
        if (text, steps) != self.alone[number]:
            self.wrong.append(f"request {number} gave {(text, steps)}, and alone {self.alone[number]}")

    async def give_up(self, number: int, chance: random.Random) -> None:
        stream = await self.client.completions.create(stream=True, **body_of(REQUESTS[number]))
        left = chance.randrange(4)
        async for _ in stream:
            if left == 0:
                break
            left -= 1
        await stream.close()

    async def mistake(self, number: int, chance: random.Random) -> None:
        async with httpx.AsyncClient() as client:
            body = {"model": NAME, **REQUESTS[number], **chance.choice(MISTAKES)}
            answer = await client.post(f"{self.url}/v1/completions", json=body)
        if answer.status_code != 400 or "message" not in answer.json()["error"]:
            self.wrong.append(f"a wrong request got {answer.status_code}: {answer.text[:200]}")


async def soak(url: str, process: subprocess.Popen[bytes], minutes: float, streams: int) -> tuple[Soak, list[float]]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        run = Soak(client, url)
        await run.ask_alone()
        ends = time.monotonic() + 60 * minutes
        clients = [asyncio.create_task(run.client_until(ends, seed)) for seed in range(streams)]
        memory = []
        while any(not task.done() for task in clients):
            memory.append(memory_mb(process))
            print(
                f"minute {len(memory) - 1}: {memory[-1]:.0f} MB, {dict(run.happened)}, wrong {len(run.wrong)}",
                flush=True,
            )
            await asyncio.wait(clients, timeout=60)
        memory.append(memory_mb(process))
        return run, memory


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("checkpoint", nargs="?", metavar="OUT")
    words.add_argument("--minutes", type=float, default=20)
    words.add_argument("--streams", type=int, default=16)
    given = words.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        process, url = start(given.checkpoint or make_model(Path(folder)))
        try:
            wait_until_ready(url, process)
            run, memory = asyncio.run(soak(url, process, given.minutes, given.streams))
            page = httpx.get(f"{url}/metrics").text
        finally:
            process.terminate()
            code = process.wait(60)
    left = {line.split()[0]: float(line.split()[1]) for line in page.splitlines() if line.startswith("redepth_")}
    after_warming = memory[min(round(WARM_MINUTES), len(memory) - 1)]
    growth = memory[-1] / after_warming - 1
    report = {
        "minutes": given.minutes,
        "streams": given.streams,
        "did": dict(run.happened),
        "wrong": len(run.wrong),
        "memory_mb": [round(value, 1) for value in memory],
        "growth_after_warming": round(growth, 4),
        "waiting_at_the_end": left["redepth_requests_waiting"],
        "rows_at_the_end": left["redepth_rows_running"],
        "pool_tokens_at_the_end": left["redepth_pool_tokens"],
        "faults": left["redepth_faults_total"],
        "exit_code": code,
    }
    print(json.dumps(report, indent=2))
    for line in run.wrong[:20]:
        print(line)
    at_rest = not any(report[name] for name in ("waiting_at_the_end", "rows_at_the_end", "pool_tokens_at_the_end"))
    sys.exit(bool(run.wrong or growth > MOST_GROWTH or not at_rest or code or report["faults"]))


if __name__ == "__main__":
    main()
