"""The time of a decoded token beside its floor: depths, contexts and batch sizes.

    python benchmarks/decode.py                                   # a random model of SmolLM2's shape, 4 + 6 + 4 layers
    python benchmarks/decode.py OUT --peer OUT --json decode.json
    python benchmarks/decode.py --threads 1 --clock cpu           # on a busy machine

*plain* is one forward call that continues a cache; *kernels* the same by the kernels for few tokens, and after it the same with
quantised layers; *generate* is what a token costs inside `generate`, sampling and stopping included. The floor, that of
unquantised weights, and all of them take turns token by token. `--peer` times forward calls of the modelling files in a folder
(published ones, or those that redepth exported) in a process of its own, on the same weights.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from turns import CLOCKS, in_turns, machine, model_of, parser_of, products, spread, with_kernels, write_measurements

from redepth import RecurrentDepthForCausalLM
from redepth.modeling.quantization import DYNAMIC, WEIGHT_ONLY
from redepth.modeling.quantizer import DepthQuantizationConfig

# What takes turns, and how its layers are quantised.
MODELS: dict[str, DepthQuantizationConfig | None] = {
    "plain": None,
    "kernels": None,
    "8 bits, dynamic": DepthQuantizationConfig(8, DYNAMIC, "all"),
    "8 bits": DepthQuantizationConfig(8, WEIGHT_ONLY, "all"),
    "4 bits": DepthQuantizationConfig(4, WEIGHT_ONLY, "all"),
}

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


def measure(
    models: dict[str, RecurrentDepthForCausalLM], case: dict[str, int], tokens: int, clock: str
) -> dict[str, Any]:
    """One case: milliseconds a token of each model, medians and quartiles, and medians as multiples of the floor.

    The rows of a batch hold the same text, whose prefill is run once.
    """
    batch, num_steps, plain = case["batch"], case["num_steps"], models["plain"]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, plain.config.vocab_size, (1, case["context"]), generator=generator)
    floor = products(plain, batch, num_steps, batch)
    runs: dict[str, Callable[[], Any]] = {"floor": floor}
    token = ids[:, :1].expand(batch, -1)
    with torch.inference_mode():
        for name, model in models.items():
            cache = model(ids, num_steps=num_steps, use_cache=True, logits_to_keep=1).past_key_values
            cache.batch_repeat_interleave(batch)
            runs[name] = partial(model, token, past_key_values=cache, num_steps=num_steps)
        times = in_turns(runs, tokens, clock)
    result = {**case, **times}
    wanted = {"max_new_tokens": tokens + 3, "min_new_tokens": tokens + 3, "do_sample": False}
    for name in ("plain", "kernels"):
        if batch > 1:  # generate streams no batches
            continue
        between = FloorBetween(floor, clock)
        models[name].generate(ids, num_steps=num_steps, streamer=between, pad_token_id=0, **wanted)
        took, own_floor = spread(between.times["generate"]), spread(between.times["floor"])
        result[f"generate, {name}"] = took
        result[f"generate, {name}, of floor"] = round(took["median"] / own_floor["median"], 3)
    for name in models:
        result[f"{name}, of floor"] = round(times[name]["median"] / times["floor"]["median"], 3)
    return result


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
    timed = [
        name for name in (*MODELS, "generate, plain", "generate, kernels", "peer") if any(name in r for r in results)
    ]
    for column in ("batch", "context", "r", "floor ms", *timed):
        table.add_column(column, justify="right")
    for case in results:
        shown = []
        for name in timed:
            if name not in case:
                shown.append("")
                continue
            ratio = case.get(f"{name}, of floor", case[name]["median"] / case["floor"]["median"])
            half = (case[name]["high"] - case[name]["low"]) / 2
            shown.append(f"{case[name]['median']:.1f} ± {half:.1f} ({ratio:.2f} ×)")
        floor = f"{case['floor']['median']:.1f} ± {(case['floor']['high'] - case['floor']['low']) / 2:.1f}"
        table.add_row(str(case["batch"]), f"{case['context']:,}", str(case["num_steps"]), floor, *shown)
    return table


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--context", type=int, nargs="+", default=[80, 1_056])
    parser.add_argument("--num-steps", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--tokens", type=int, default=24, help="timed tokens in each case")
    parser.add_argument("--peer", type=Path, help="a folder with other modelling files to time on the same weights")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    plain = model_of(options.folder, tuple(options.layers), options.seed)
    models = {name: plain if name == "plain" else with_kernels(plain, how) for name, how in MODELS.items()}
    console, results = Console(width=230), []
    cases = [
        {"batch": b, "context": c, "num_steps": r}
        for b in options.batch
        for c in options.context
        for r in options.num_steps
    ]
    with console.status("decoding"):
        for case in cases:
            results.append(measure(models, case, options.tokens, options.clock))
            console.print(case, {name: results[-1][f"{name}, of floor"] for name in MODELS})
    if options.peer is not None:
        with TemporaryDirectory() as scratch:
            weights = options.folder
            if weights is None:
                weights = Path(scratch)
                plain.save_pretrained(weights)
            for result, times in zip(results, measure_peer(options.peer, weights, results, options), strict=True):
                result["peer"] = times
    measured_on = machine()
    shape = "a random model of SmolLM2's shape" if options.folder is None else options.folder.name
    where = f"{options.threads} threads, {measured_on['processor']}, {measured_on['instructions']}"
    console.print(table_of(results, f"{shape}, ms a token (of floor), {where}"))
    write_measurements(options, results)


if __name__ == "__main__":
    main()
