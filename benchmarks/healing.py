"""One optimiser step of healing at SmolLM2-135M's shape: tokens/s, peak memory, and how near to its matrix products.

    python benchmarks/healing.py                             # r = 4 and 16, fp32 and bf16
    python benchmarks/healing.py --precision bf16 --compile  # each layer through torch.compile (needs a C++ compiler)
    python benchmarks/healing.py --precision bf16 --num-steps 0,16 --profile

Every case runs in a process of its own (Linux), from random weights and random text. The floor is the time that the
products with weights take alone, forward and backward, measured between the steps on the same shapes and in the same
dtype; attention's own products are not in it. Times are medians, with the fastest and slowest in brackets. On a machine
that others use too, OMP_NUM_THREADS=1 with --processor-time still tells the share.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from redepth.modeling import RecurrentDepthConfig, RecurrentDepthForCausalLM
from redepth.modeling.blocks import Block
from redepth.modeling.loss import LOGITS_AT_ONCE
from redepth.runtime import keep_freed_memory

SHAPE: dict[str, Any] = {
    "n_embd": 576,
    "n_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 1536,
    "n_layers_in_prelude": 12,
    "n_layers_in_recurrent_block": 6,
    "n_layers_in_coda": 12,
    "vocab_size": 49152,
    "tie_embeddings": True,
    "block_size": 2048,
    "norm_placement": "pre",
    "rope_style": "half",
    "qk_bias": False,
    "norm_before_coda": False,
    "initial_state_mode": "embed",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# (tokens, inputs, outputs) of a product, and whether its backward products run too.
Product = tuple[int, int, int, bool]


def products(config: RecurrentDepthConfig, tokens: int, without: int, steps: int) -> Counter[Product]:
    """How often one optimiser step runs each product with a weight."""
    width, inner = config.n_embd, config.intermediate_size
    heads = config.n_heads * config.head_dim
    qkv = heads + 2 * config.num_key_value_heads * config.head_dim
    layer = [(width, qkv), (heads, width), (width, 2 * inner), (inner, width)]
    count: Counter[Product] = Counter()

    def add(shapes: list[tuple[int, int]], times: int, learns: bool) -> None:
        for inputs, outputs in shapes:
            count[tokens, inputs, outputs, learns] += times

    outside, core = config.n_layers_in_prelude + config.n_layers_in_coda, config.n_layers_in_recurrent_block
    add(layer, outside + core * steps, True)
    add([(2 * width, width)], steps, True)
    add(layer, core * without, False)
    add([(2 * width, width)], without, False)
    at_once = LOGITS_AT_ONCE // config.vocab_size
    for first in range(0, tokens, at_once):
        count[min(at_once, tokens - first), width, config.vocab_size, True] += 1
    return count


def floor_seconds(count: Counter[Product], dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """Time of all products, each run twice here and the faster run counted."""
    total = 0.0
    for (tokens, inputs, outputs, learns), times in count.items():
        x, weight = torch.randn(tokens, inputs, dtype=dtype), torch.randn(outputs, inputs, dtype=dtype)
        grad = torch.randn(tokens, outputs, dtype=dtype)
        runs: list[Callable[[], torch.Tensor]] = [lambda x=x, weight=weight: x @ weight.t()]
        if learns:
            runs += [lambda grad=grad, weight=weight: grad @ weight, lambda grad=grad, x=x: grad.t() @ x]
        for run in runs:
            total += times * min(seconds(run, clock) for _ in range(2))
    return total


def seconds(run: Callable[[], Any], clock: Callable[[], float]) -> float:
    started = clock()
    run()
    return clock() - started


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One case, in this process."""
    keep_freed_memory()
    torch.manual_seed(0)
    without, steps = (int(part) for part in options.num_steps[0].split(","))
    dtype = DTYPES[options.precision[0]]
    config = RecurrentDepthConfig(**SHAPE)
    model = RecurrentDepthForCausalLM(config).train()
    if options.compile:
        for module in model.modules():
            if isinstance(module, Block):
                module.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens = options.rows * options.length

    def step() -> None:
        ids = torch.randint(config.vocab_size, (options.rows, options.length))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(ids, labels=ids, num_steps=(without, steps), loss_only=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()
    peak_bytes = 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]
    count = products(config, tokens, without, steps)
    clock = time.process_time if options.processor_time else time.perf_counter
    floor_seconds(count, dtype, clock)
    took, floors = [], []
    for _ in range(options.repeats):
        took.append(seconds(step, clock))
        floors.append(floor_seconds(count, dtype, clock))
    if options.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=16), file=sys.stderr)
    flops = sum(2 * m * k * n * times * (3 if learns else 1) for (m, k, n, learns), times in count.items())
    shares = [floor / whole for floor, whole in zip(floors, took, strict=True)]
    return {
        "precision": options.precision[0],
        "without_gradient": without,
        "with_gradient": steps,
        "compile": options.compile,
        "tokens": tokens,
        "seconds": took,
        "floor_seconds": floors,
        "tokens_per_second": tokens / statistics.median(took),
        "share_of_products": statistics.median(shares),
        "share_range": [min(shares), max(shares)],
        "product_tflops_per_second": flops / statistics.median(floors) / 1e12,
        "peak_gb": peak_bytes / 1e9,
    }


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def show(results: list[dict[str, Any]]) -> None:
    table = Table(
        "precision", "steps", "compiled", "tokens/s", "step, s", "products, s", "share", "TFLOP/s", "peak GB",
        title=f"{results[0]['tokens']} tokens a step, torch {torch.__version__}, {torch.get_num_threads()} threads",
    )  # fmt: skip
    for case in results:
        without, steps = case["without_gradient"], case["with_gradient"]
        table.add_row(
            case["precision"],
            f"{without + steps}, the last {steps} with gradient" if without else f"{steps}",
            "yes" if case["compile"] else "no",
            f"{case['tokens_per_second']:.0f}",
            spread(case["seconds"]),
            spread(case["floor_seconds"]),
            f"{case['share_of_products']:.0%} [{case['share_range'][0]:.0%}, {case['share_range'][1]:.0%}]",
            f"{case['product_tflops_per_second']:.2f}",
            f"{case['peak_gb']:.1f}",
        )
    Console(width=140).print(table)


def depth_pair(text: str) -> str:
    """WITHOUT,WITH from either form of `--num-steps`, as argparse wants its types."""
    parts = text.split(",")
    if len(parts) > 2 or not all(part.isdigit() for part in parts) or not any(int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of steps nor WITHOUT,WITH such as 8,8")
    return text if len(parts) == 2 else f"0,{text}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", choices=[*DTYPES], default=[*DTYPES])
    parser.add_argument(
        "--num-steps",
        nargs="+",
        type=depth_pair,
        default=["0,4", "8,8", "0,16"],
        help="steps, all with gradient, or WITHOUT,WITH gradient; several for several cases",
    )
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--processor-time", action="store_true", help="instead of time on the wall; for one thread")
    parser.add_argument("--profile", action="store_true", help="print the operators of one more step")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    cases = [(precision, steps) for precision in options.precision for steps in options.num_steps]
    if len(cases) == 1:
        results = [measure(options)]
    else:
        results = []
        for precision, steps in cases:
            words = [sys.executable, __file__, "--precision", precision, "--num-steps", steps, "--json", "/dev/stdout"]
            for name in ("rows", "length", "repeats"):
                words += [f"--{name}", str(getattr(options, name))]
            switches = ("compile", "profile", "processor_time")
            words += ["--" + name.replace("_", "-") for name in switches if getattr(options, name)]
            printed = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
            results += json.loads(printed[: printed.index("\n]") + 2])
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    show(results)


if __name__ == "__main__":
    main()
