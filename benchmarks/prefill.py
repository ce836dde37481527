"""The time and the memory of reading a prompt, beside the floor: at once, and in chunks.

    python benchmarks/prefill.py                       # 1,024 and 4,096 tokens, r = 4
    python benchmarks/prefill.py --threads 1 --clock cpu --tokens 1024

`chunked` feeds the prompt 512 tokens at a time. Each length runs in a process of its own, so that `peak` is its own peak
of resident memory, the model included.
"""

import argparse
import json
import resource
import subprocess
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from turns import in_turns, machine, model_of, parser_of, products, write_measurements

from redepth import RecurrentDepthCache

CHUNK = 512


def peak_mib() -> float:
    """Of this process so far; Linux counts kibibytes, macOS bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 10 if sys.platform != "darwin" else 1 << 20)


def measure(options: argparse.Namespace, tokens: int) -> dict[str, Any]:
    model = model_of(options.folder, tuple(options.layers), options.seed)
    ids = torch.randint(3, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(options.seed))
    settings = {"num_steps": options.num_steps, "use_cache": True, "logits_to_keep": 1}
    before = peak_mib()

    def in_chunks() -> None:
        cache = RecurrentDepthCache(model.config)
        for chunk in ids.split(CHUNK, dim=1):
            model(chunk, past_key_values=cache, **settings)

    with torch.inference_mode():
        model(ids, **settings)
        peak = peak_mib()
        runs = {"redepth": lambda: model(ids, **settings), "chunked": in_chunks}
        runs["floor"] = products(model, tokens, options.num_steps, 1)
        times = in_turns(runs, options.repeats, options.clock)
    floor = times["floor"]["median"]
    ratios = {f"{name}_of_floor": round(times[name]["median"] / floor, 3) for name in ("redepth", "chunked")}
    return {"tokens": tokens, **times, **ratios, "peak_mib": round(peak), "peak_mib_before": round(before)}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_024, 4_096])
    parser.add_argument("--num-steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    if options.one is not None:
        print(json.dumps(measure(options, options.one)))
        return
    console, results = Console(width=120), []
    for tokens in options.tokens:
        with console.status(f"{tokens:,} tokens"):
            command = [sys.executable, *sys.argv, "--one", str(tokens)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{tokens} tokens failed: {done.stderr.strip().splitlines()[-1]}")
        results.append(json.loads(done.stdout.splitlines()[-1]))
    table = Table(title=f"r = {options.num_steps}, {options.threads} threads, {machine()['processor']}")
    for column in ("tokens", "floor ms", "redepth ms", "of floor", "chunked ms", "of floor", "peak MiB (before)"):
        table.add_column(column, justify="right")
    for row in results:
        table.add_row(
            f"{row['tokens']:,}",
            f"{row['floor']['median']:,.0f}",
            f"{row['redepth']['median']:,.0f}",
            f"{row['redepth_of_floor']:.2f} ×",
            f"{row['chunked']['median']:,.0f}",
            f"{row['chunked_of_floor']:.2f} ×",
            f"{row['peak_mib']:,} ({row['peak_mib_before']:,})",
        )
    console.print(table)
    write_measurements(options, results)


if __name__ == "__main__":
    main()
