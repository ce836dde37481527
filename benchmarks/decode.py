"""The time of a decoded token beside its floor: depths, contexts and batch sizes.

    python benchmarks/decode.py                                   # a random model of SmolLM2's shape, 4 + 6 + 4 layers
    python benchmarks/decode.py OUT --peer OUT --json decode.json
    python benchmarks/decode.py --threads 1 --clock cpu           # on a busy machine

`redepth` is one forward call that continues a cache, `compiled` the same with a compiled core; `generate` is what a token
costs inside `generate`, sampling and stopping included. Floor and both take turns token by token. `--peer` times forward calls of the modelling files in a folder
(published ones, or those that redepth exported) in a process of its own, on the same weights.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from turns import CLOCKS, in_turns, machine, model_of, parser_of, products, spread, write_measurements

from redepth import RecurrentDepthForCausalLM

# Runs in the peer's process: argv is the folder, the cases as JSON, tokens and threads; prints milliseconds as JSON lines.
PEER = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM
folder, cases, tokens, threads, clock = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
torch.set_num_threads(threads)
now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
with torch.inference_mode():
    for case in cases:
        ids = torch.randint(3, model.config.vocab_size, (case["batch"], case["context"]))
        cache = model(ids, num_steps=case["num_steps"], use_cache=True).past_key_values
        times = []
        for _ in range(tokens + 1):
            place = torch.tensor([[ids.shape[1] + len(times)]])
            started = now()
            model(ids[:, :1], num_steps=case["num_steps"], past_key_values=cache, use_cache=True, position_ids=place)
            times.append(1e3 * (now() - started))
        print(json.dumps(times[1:]), flush=True)
"""


class FloorBetween:
    """A streamer that runs the floor after each token of `generate`, and keeps the times of both apart.

    Args:
        floor: the products of one token.
    """

    def __init__(self, floor: Callable[[], None], clock: str) -> None:
        self.floor, self.now = floor, CLOCKS[clock]
        self.times: dict[str, list[float]] = {"generate": [], "floor": []}
        self.resumed: float | None = None
        self.seen = 0

    def put(self, tokens: torch.Tensor) -> None:
        came = self.now()
        # The prompt comes first, then the token that its prefill gave, then one that is not warm yet.
        if self.seen > 2 and self.resumed is not None:
            self.times["generate"].append(1e3 * (came - self.resumed))
        self.seen += 1
        started = self.now()
        self.floor()
        self.resumed = self.now()
        if self.seen > 3:
            self.times["floor"].append(1e3 * (self.resumed - started))

    def end(self) -> None:
        """Nothing is left to print."""


def with_compiled_core(model: RecurrentDepthForCausalLM, run: Callable[[], Any]) -> None:
    model.transformer.core_is_compiled = True
    run()
    model.transformer.core_is_compiled = False


def measure(
    model: RecurrentDepthForCausalLM, batch: int, context: int, num_steps: int, tokens: int, clock: str, compiled: bool
) -> dict[str, Any]:
    """One case: milliseconds a token, medians and quartiles, and medians as multiples of the floor.

    The rows of a batch hold the same text, whose prefill is run once.
    """
    ids = torch.randint(3, model.config.vocab_size, (1, context), generator=torch.Generator().manual_seed(0))
    floor = products(model, batch, num_steps, batch)
    with torch.inference_mode():
        cache = model(ids, num_steps=num_steps, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(batch)
        token, cached = ids[:, :1].expand(batch, -1), {"past_key_values": cache, "num_steps": num_steps}
        runs = {"redepth": lambda: model(token, **cached), "floor": floor}
        if compiled:
            runs["compiled"] = lambda: with_compiled_core(model, lambda: model(token, **cached))
        times = in_turns(runs, tokens, clock)
    between = FloorBetween(floor, clock)
    streamer = between if batch == 1 else None  # generate streams no batches
    if streamer is not None:
        wanted = {"max_new_tokens": tokens + 3, "min_new_tokens": tokens + 3, "do_sample": False}
        model.generate(ids, num_steps=num_steps, streamer=streamer, pad_token_id=0, **wanted)
        times["generate"] = spread(between.times["generate"])
    case = {"batch": batch, "context": context, "num_steps": num_steps, **times}
    case["of_floor"] = round(times["redepth"]["median"] / times["floor"]["median"], 3)
    if compiled:
        case["compiled_of_floor"] = round(times["compiled"]["median"] / times["floor"]["median"], 3)
    if streamer is not None:
        own_floor = spread(between.times["floor"])["median"]
        case["generate_of_floor"] = round(times["generate"]["median"] / own_floor, 3)
    return case


def measure_peer(
    folder: Path, weights: Path, cases: list[dict[str, Any]], options: argparse.Namespace
) -> list[dict[str, float]]:
    """The same cases in another process, by the modelling files of `folder` on the checkpoint in `weights`.

    Raises:
        SystemExit: for a folder without modelling files, and where they fail.
    """
    files = list(folder.glob("*.py"))
    if not files:
        raise SystemExit(f"--peer {folder} holds no modelling files (*.py); give a folder with published ones")
    with TemporaryDirectory() as scratch:
        place = Path(scratch)
        for file in weights.iterdir():
            if file.suffix in (".safetensors", ".json"):
                (place / file.name).symlink_to(file.resolve())
        # The peer's code reads the peer's way of naming its classes.
        theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = json.loads((weights / "config.json").read_text(encoding="utf-8"))
        (place / "config.json").unlink()
        config["auto_map"] = theirs.get("auto_map", config.get("auto_map"))
        (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
        for file in files:
            (place / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
        wanted = [{key: case[key] for key in ("batch", "context", "num_steps")} for case in cases]
        command = [sys.executable, "-c", PEER, str(place), json.dumps(wanted)]
        command += [str(options.tokens), str(options.threads), options.clock]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"--peer {folder} failed: {done.stderr.strip().splitlines()[-1]}")
    return [spread(json.loads(line)) for line in done.stdout.splitlines() if line.startswith("[")]


def table_of(results: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title)
    for column in (
        "batch",
        "context",
        "r",
        "floor ms",
        "redepth ms",
        "of floor",
        "generate",
        "of floor",
        "compiled",
        "of floor",
        "peer",
    ):
        table.add_column(column, justify="right")
    for case in results:
        times = ("floor", "redepth", "generate", "compiled", "peer")
        shown = {name: f"{case[name]['median']:.1f}" for name in times if name in case}
        table.add_row(
            str(case["batch"]),
            f"{case['context']:,}",
            str(case["num_steps"]),
            shown["floor"],
            f"{shown['redepth']} ({case['redepth']['low']:.1f}–{case['redepth']['high']:.1f})",
            f"{case['of_floor']:.2f} ×",
            shown.get("generate", ""),
            f"{case['generate_of_floor']:.2f} ×" if "generate_of_floor" in case else "",
            shown.get("compiled", ""),
            f"{case['compiled_of_floor']:.2f} ×" if "compiled_of_floor" in case else "",
            shown.get("peer", ""),
        )
    return table


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--context", type=int, nargs="+", default=[80, 1_056])
    parser.add_argument("--num-steps", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--tokens", type=int, default=24, help="timed tokens in each case")
    parser.add_argument("--compile-core", action="store_true", help="time it with a compiled core as well")
    parser.add_argument("--peer", type=Path, help="a folder with other modelling files to time on the same weights")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    model = model_of(options.folder, tuple(options.layers), options.seed)
    console, results = Console(width=120), []
    if options.compile_core and not model.compile_core():
        raise SystemExit("--compile-core needs a compiler; leave it out")
    model.transformer.core_is_compiled = False
    cases = [(b, c, r) for b in options.batch for c in options.context for r in options.num_steps]
    with console.status("decoding"):
        for case in cases:
            results.append(measure(model, *case, options.tokens, options.clock, options.compile_core))
            ratios = {name: value for name, value in results[-1].items() if name.endswith("of_floor")}
            console.print(f"batch {case[0]}, context {case[1]}, r = {case[2]}: {ratios}")
    if options.peer is not None:
        with TemporaryDirectory() as scratch:
            weights = options.folder
            if weights is None:
                weights = Path(scratch)
                model.save_pretrained(weights)
            for result, times in zip(results, measure_peer(options.peer, weights, results, options), strict=True):
                result["peer"] = times
    measured_on = machine()
    shape = "a random model of SmolLM2's shape" if options.folder is None else options.folder.name
    console.print(table_of(results, f"{shape}, {options.threads} threads, {measured_on['processor']}"))
    write_measurements(options, results)


if __name__ == "__main__":
    main()
