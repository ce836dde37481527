"""Throughput and latency of the engine, against one request at a time and against static batches, in one run.

    python benchmarks/serving.py OUT
    python benchmarks/serving.py OUT --json serving.json --write docs/serving.md
    python benchmarks/serving.py OUT --json serving.json --only kl --streams 4      # a part; the rest of the file stays
    python benchmarks/serving.py OUT --json serving.json --only --write docs/serving.md      # nothing: the file's table

Streams are clients: each asks for its next answer when it has the last. Prompts are pieces of text of 8 to 24 tokens, depths
are drawn from 1, 2, 4, 8, 16 and 32 in equal shares, or every token leaves by an exit test. All three ways answer the same
requests, greedily:

- *one at a time*: `model.generate` for one request after another. `--timed` of the requests, as many of each policy, are
  timed and stand for the others.
- *static batches*: `model.generate` for one request of every stream, padded, at the depth of the deepest of them; the next
  batch starts when all are done.
- *engine*: `redepth.serving.engine.Engine`.

*First token* and *between tokens* are what a stream sees. The second table has the streams at r = 1 and 2 alone, and
with as many at r = 16 and 32 beside them.
"""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pages import replace_table
from rich.console import Console
from transformers import StoppingCriteria, StoppingCriteriaList
from turns import CLOCKS, machine

from redepth import load
from redepth.checkpoint.load import load_tokenizer
from redepth.modeling import DepthPolicy
from redepth.serving.engine import Engine
from redepth.serving.request import Request, Sampling

DEPTHS = (1, 2, 4, 8, 16, 32)
SHALLOW, DEEP = (1, 2), (16, 32)
MOST_STREAMS = 16
TEXT = Path(__file__).parent.parent / "README.md"


class Watch:
    """The clock that all times are read from."""

    now = CLOCKS["wall"]


CLOCK = Watch()


@dataclass(frozen=True)
class Asked:
    """One request: its prompt, and the keywords of its policy."""

    prompt: tuple[int, ...]
    policy: tuple[tuple[str, Any], ...]

    @property
    def num_steps(self) -> int:
        return dict(self.policy)["num_steps"]


@dataclass
class Seen:
    """What the streams saw, in seconds."""

    tokens: int = 0
    took: float = 0.0
    first: list[float] = field(default_factory=list)
    between: dict[int, list[float]] = field(default_factory=dict)
    steps: int = 0

    def take(self, num_steps: int, asked_at: float, times: list[float]) -> None:
        """The times at which one stream got its tokens."""
        self.first.append(times[0] - asked_at)
        self.between.setdefault(num_steps, []).extend(np.diff(times).tolist())
        self.tokens += len(times)

    def figures(self) -> dict[str, float]:
        gaps = [gap for of_depth in self.between.values() for gap in of_depth]
        found = {"tokens_per_second": self.tokens / self.took}
        for name, values in (("first_token", self.first), ("between_tokens", gaps)):
            for share in (50, 95):
                found[f"{name}_p{share}_ms"] = 1000 * float(np.percentile(values, share))
        if self.steps:
            found["steps_per_token"] = self.steps / self.tokens
        return found


class Clock(StoppingCriteria):
    """Notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **keywords: Any) -> torch.Tensor:
        self.times.append(CLOCK.now())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def requests(ids: list[int], streams: int, each: int, choices: list[dict[str, Any]]) -> list[list[Asked]]:
    """For every stream its requests; each choice of policy as often as the others, in a random order."""
    draw = random.Random(streams)
    policies = [choices[i % len(choices)] for i in range(streams * each)]
    draw.shuffle(policies)
    asked = []
    for policy in policies:
        start = draw.randrange(len(ids) - 32)
        asked.append(Asked(tuple(ids[start : start + draw.randint(8, 24)]), tuple(policy.items())))
    return [asked[stream::streams] for stream in range(streams)]


def timed_generate(model: Any, together: list[Asked], tokens: int) -> tuple[float, list[float]]:
    """One call for some requests, padded on the left, at the depth of the deepest; its start, and when tokens came."""
    width = max(len(one.prompt) for one in together)
    rows = [[0] * (width - len(one.prompt)) + list(one.prompt) for one in together]
    mask = [[0] * (width - len(one.prompt)) + [1] * len(one.prompt) for one in together]
    deepest = max(together, key=lambda one: one.num_steps)
    clock, started = Clock(), CLOCK.now()
    model.generate(
        torch.tensor(rows),
        attention_mask=torch.tensor(mask),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        stopping_criteria=StoppingCriteriaList([clock]),
        **dict(deepest.policy),
    )
    return started, clock.times


def one_at_a_time(model: Any, streams: list[list[Asked]], tokens: int, timed: int) -> Seen:
    seen = Seen()
    of_policy: dict[Any, list[Asked]] = defaultdict(list)
    for stream in streams:
        for one in stream:
            of_policy[one.policy].append(one)
    for alike in of_policy.values():
        chosen = alike[: max(1, timed // len(of_policy))]
        for number, one in enumerate(chosen):
            started, times = timed_generate(model, [one], tokens)
            for _ in alike[number :: len(chosen)]:
                seen.take(one.num_steps, started, times)
                seen.took += times[-1] - started
    return seen


def static_batches(model: Any, streams: list[list[Asked]], tokens: int, timed: int) -> Seen:
    seen = Seen()
    for together in zip(*streams, strict=True):
        started, times = timed_generate(model, list(together), tokens)
        seen.took += times[-1] - started
        for one in together:
            seen.take(one.num_steps, started, times)
    return seen


def with_engine(model: Any, streams: list[list[Asked]], tokens: int, timed: int) -> Seen:
    seen, engine = Seen(), Engine(model, max_rows=len(streams))
    times: dict[Request, list[float]] = {}
    asked_at: dict[Request, float] = {}
    stream_of: dict[Request, list[Asked]] = {}

    def ask(stream: list[Asked]) -> None:
        if stream:
            one, *rest = stream
            policy = DepthPolicy.resolve(model.config, **dict(one.policy))
            request = engine.submit(one.prompt, policy, Sampling(tokens, stop_ids=()))
            times[request], asked_at[request], stream_of[request] = [], CLOCK.now(), rest

    started = CLOCK.now()
    for stream in streams:
        ask(stream)
    while engine.has_work:
        for request, token in engine.step():
            assert token is not None, request.error
            times[request].append(CLOCK.now())
            if request.is_finished:
                seen.take(request.policy.num_steps, asked_at[request], times[request])
                seen.steps += request.steps
                ask(stream_of[request])
    seen.took = CLOCK.now() - started
    return seen


WAYS = {"one at a time": one_at_a_time, "static batches": static_batches, "engine": with_engine}
KINDS: dict[str, list[dict[str, Any]]] = {
    "mixed depths": [{"num_steps": r} for r in DEPTHS],
    "latent-diff": [{"num_steps": max(DEPTHS), "criterion": "latent-diff"}],
    "kl": [{"num_steps": max(DEPTHS), "criterion": "kl"}],
}


def compare(model: Any, ids: list[int], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A line for each kind of request, number of streams and way."""
    for kind, choices in KINDS.items():
        for streams in options.streams if kind in options.only else ():
            asked = requests(ids, streams, max(options.each, -(-options.least // streams)), choices)
            for way, run in WAYS.items():
                figures = run(model, asked, options.tokens, options.timed).figures()
                yield {"requests": kind, "streams": streams, "way": way} | figures


def beside_deep_ones(model: Any, ids: list[int], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What shallow streams see alone, and with deep ones beside them."""
    half = MOST_STREAMS // 2
    # More of the shallow ones than of the deep, so that these are there all the time.
    shallow = requests(ids, half, 2 * options.each, [{"num_steps": r} for r in SHALLOW])
    deep = requests(ids, half, 1, [{"num_steps": r} for r in DEEP])
    for name, streams in (("alone", shallow), ("beside deep ones", shallow + deep)):
        seen = with_engine(model, streams, options.tokens, options.timed)
        gaps = [gap for r in SHALLOW for gap in seen.between[r]]
        figures = {f"between_tokens_p{share}_ms": 1000 * float(np.percentile(gaps, share)) for share in (50, 95)}
        yield {"shallow streams": name, "streams": len(streams)} | figures


def as_table(lines: list[dict[str, Any]]) -> str:
    heads = list(dict.fromkeys(key for line in lines for key in line))
    rows = [
        [f"{line[key]:.3g}" if isinstance(line.get(key), float) else str(line.get(key, "")) for key in heads]
        for line in lines
    ]
    titles = [
        head.replace("_per_", "/").replace("_p50_ms", " p50, ms").replace("_p95_ms", " p95, ms") for head in heads
    ]
    titles = [title.replace("_", " ").replace("tokens/second", "tokens/s") for title in titles]
    return "\n".join("| " + " | ".join(row) + " |" for row in (titles, ["---"] * len(titles), *rows))


def noted(config: Any, options: argparse.Namespace) -> str:
    """What the figures depend on, in a line."""
    here = machine()
    return (
        f"{options.tokens} new tokens an answer, fp32, {config.n_layers_in_prelude} + {config.n_layers_in_recurrent_block} + "
        f"{config.n_layers_in_coda} layers of width {config.n_embd}; torch {here['torch']}, {options.threads} threads, "
        f"{options.clock} time, {here['processor']}, {here['instructions']}."
    )


def measured_before(file: Path, note: str) -> list[dict[str, Any]]:
    """The lines of a file, if there is one.

    Raises:
        SystemExit: where they were measured in another way or elsewhere.
    """
    if not file.exists():
        return []
    before = json.loads(file.read_text(encoding="utf-8"))
    if before["note"] != note:
        raise SystemExit(f"{file} was measured otherwise ({before['note']}); name another file")
    return before["lines"]


def merged(before: list[dict[str, Any]], now: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines with one more, which takes the place of its like; in the order of the whole run."""

    def place(line: dict[str, Any]) -> tuple[int, int, int]:
        if "requests" not in line:
            return len(KINDS), line["streams"], 0
        return list(KINDS).index(line["requests"]), line["streams"], list(WAYS).index(line["way"])

    lines = {place(line): line for line in [*before, now]}
    return [lines[key] for key in sorted(lines)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, MOST_STREAMS])
    parser.add_argument("--each", type=int, default=3, help="requests of each stream, at least")
    parser.add_argument("--least", type=int, default=6, help="requests in all, at least")
    parser.add_argument("--timed", type=int, default=6, help="requests that are timed one at a time")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens of each answer")
    parser.add_argument("--only", nargs="*", default=[*KINDS, "shallow"], choices=[*KINDS, "shallow"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for a busy machine")
    parser.add_argument("--json", type=Path, help="the figures so far; what is measured now takes its place")
    parser.add_argument("--write", type=Path, help="a page whose table to replace")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    CLOCK.now = CLOCKS[options.clock]
    model, tokenizer = load(options.checkpoint, "float32"), load_tokenizer(options.checkpoint)
    ids = tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"]
    warm_up = requests(ids, 2, 1, [{"num_steps": 2}])
    for run in WAYS.values():
        run(model, warm_up, 2, 2)
    note = noted(model.config, options)
    lines = [] if options.json is None else measured_before(options.json, note)
    shallow = beside_deep_ones(model, ids, options) if "shallow" in options.only else ()
    for line in chain(compare(model, ids, options), shallow):
        Console(stderr=True).print(line)
        lines = merged(lines, line)
        if options.json is not None:
            options.json.write_text(json.dumps({"note": note, "lines": lines}, indent=1), encoding="utf-8")
    tables = [[line for line in lines if head in line] for head in ("requests", "shallow streams")]
    page = "\n\n".join([*(as_table(table) for table in tables if table), note])
    if options.write is None:
        print(page)
    else:
        replace_table(options.write, Path(__file__).name, page)


if __name__ == "__main__":
    main()
