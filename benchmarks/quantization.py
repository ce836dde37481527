"""Quantised cores: one pass of a core's products by kernel, and decoding by kind, in turns in one run.

    python benchmarks/quantization.py OUT --threads 2 --write docs/quantization.md

The first table has the milliseconds of the products of one core pass, each at its own inputs, by kernel and number of
tokens; *rel. error* is that of the products beside fp32, on the checkpoint's own weights and random inputs. The second has
the milliseconds of a decoded token after 64 tokens, medians over the turns with half their spread. Kinds take turns, so that
other work on the machine is shared by all.
"""

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from pages import replace_table
from rich.console import Console
from torch.nn import functional as F
from turns import with_kernels

from redepth import RecurrentDepthCache, load
from redepth.modeling import few_tokens
from redepth.modeling.quantized_linear import (
    DYNAMIC,
    WEIGHT_ONLY,
    DynamicInt8,
    Half,
    PackedInt4,
    PackedInt8,
    QuantizedLinear,
)
from redepth.modeling.quantized_weights import quantize
from redepth.modeling.quantizer import DepthQuantizationConfig, quantize_model

TOKENS = (1, 8, 32, 64)
CONTEXT = 64
# By label: bits, kernel and dtype of the activations; no kernel for torch's own product.
KERNELS: dict[str, tuple[int, Any, torch.dtype]] = {
    "fp32": (32, None, torch.float32),
    "bf16": (32, None, torch.bfloat16),
    "fp16 weights": (16, Half, torch.float32),
    "8 bits, `dynamic`": (8, DynamicInt8, torch.float32),
    "8 bits, `weight-only`": (8, Half, torch.float32),
    "8 bits, `weight-only`, bf16": (8, PackedInt8, torch.bfloat16),
    "4 bits": (4, Half, torch.float32),
    "4 bits, bf16": (4, PackedInt4, torch.bfloat16),
    "fp32, kernels": (32, few_tokens, torch.float32),
    "8 bits, kernels": (8, few_tokens, torch.float32),
    "4 bits, kernels": (4, few_tokens, torch.float32),
}
KINDS: dict[str, DepthQuantizationConfig | None] = {
    "fp32": None,
    "8 bits, `dynamic`, core": DepthQuantizationConfig(8, DYNAMIC),
    "8 bits, `dynamic`, all": DepthQuantizationConfig(8, DYNAMIC, "all"),
    "8 bits, `weight-only`, all": DepthQuantizationConfig(8, WEIGHT_ONLY, "all"),
    "4 bits, all": DepthQuantizationConfig(4, WEIGHT_ONLY, "all"),
}


def product(weight: torch.Tensor, bits: int, kernel: Any, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    if kernel is few_tokens:
        linear = torch.nn.Linear(*weight.shape[::-1], bias=False)
        linear.weight = torch.nn.Parameter(weight.detach())
        return partial(few_tokens.product, linear if bits == 32 else QuantizedLinear.of(linear, WEIGHT_ONLY, bits, 32))
    if kernel is None:
        held = weight.to(dtype)
        return lambda x: F.linear(x, held)
    return kernel(quantize(weight, bits, 32), weight.shape[1], dtype)


def seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


@torch.inference_mode()
def time_products(model: Any, turns: int) -> list[list[str]]:
    """A line for each kernel."""
    weights = [
        module.weight for module in model.transformer.core_block.modules() if isinstance(module, torch.nn.Linear)
    ]
    products = {label: [product(weight, *how) for weight in weights] for label, how in KERNELS.items()}
    inputs = {(n, w.shape[1]): torch.randn(n, w.shape[1]) for n in TOKENS for w in weights}
    times: dict[tuple[str, int], list[float]] = {}
    for turn in range(turns + 1):
        for label, (_, _, dtype) in KERNELS.items():
            for tokens in TOKENS:
                if "bits, kernels" in label and tokens > few_tokens.MOST_QUANTIZED:
                    continue
                given = [inputs[tokens, weight.shape[1]].to(dtype) for weight in weights]
                took = seconds(lambda: [run(x) for run, x in zip(products[label], given, strict=True)])  # noqa: B023
                if turn:
                    times.setdefault((label, tokens), []).append(took)
    lines = []
    for label, (_, _, dtype) in KERNELS.items():
        errors = []
        for weight, run in zip(weights, products[label], strict=True):
            x = inputs[8, weight.shape[1]]
            wanted = F.linear(x, weight)
            errors.append(float((run(x.to(dtype)).float() - wanted).norm() / wanted.norm()))
        line = [
            f"{1000 * statistics.median(times[label, tokens]):.2f}" if (label, tokens) in times else ""
            for tokens in TOKENS
        ]
        lines.append([label, *line, f"{max(errors):.1e}" if max(errors) else ""])
    return lines


@torch.inference_mode()
def prompt_cache(model: Any, batch: int, num_steps: int) -> RecurrentDepthCache:
    """Keys and values of CONTEXT tokens in each row, which all kinds go on from."""
    ids = torch.randint(5, 1000, (batch, CONTEXT), generator=torch.Generator().manual_seed(0))
    cache = RecurrentDepthCache(model.config)
    model(ids, num_steps=num_steps, past_key_values=cache, logits_to_keep=1)
    return cache


@torch.inference_mode()
def time_decoding(model: Any, cache: RecurrentDepthCache, batch: int, num_steps: int, tokens: int) -> list[float]:
    """Seconds of each of some decoded tokens."""
    token = torch.full((batch, 1), 7)
    run = lambda: model(token, num_steps=num_steps, past_key_values=cache)  # noqa: E731
    run()
    took = [seconds(run) for _ in range(tokens)]
    cache.crop(-tokens - 1)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=6, help="decoded in each turn")
    parser.add_argument("--num-steps", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--write", type=Path, help="a page whose table to replace")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load(options.checkpoint, "float32")
    products = time_products(model, 4 * options.turns)
    models = {}
    for label, config in KINDS.items():
        models[label] = copy.deepcopy(model)
        if config is not None:
            quantize_model(models[label], config)
        models[f"{label}, kernels"] = with_kernels(models[label])
    columns = [(r, batch) for r in options.num_steps for batch in options.batches]
    times: dict[tuple[str, int, int], list[float]] = {}
    for r, batch in columns:
        cache = prompt_cache(model, batch, r)
        for _ in range(options.turns):
            for label in models:
                took = time_decoding(models[label], cache, batch, r, options.tokens)
                times.setdefault((label, r, batch), []).extend(took)
    lines = []
    for label in models:
        line = [label]
        for r, batch in columns:
            took, plain = times[label, r, batch], statistics.median(times["fp32", r, batch])
            median = statistics.median(took)
            low, _, high = statistics.quantiles(took, n=4)
            line.append(f"{1000 * median:.1f} ± {1000 * (high - low) / 2:.1f} ({plain / median:.2f} ×)")
        lines.append(line)
    tables = [
        [["products of one core pass, ms", *(f"{n} tokens" for n in TOKENS), "rel. error"], *products],
        [["a decoded token, ms", *(f"r = {r}, batch {batch}" for r, batch in columns)], *lines],
    ]
    pages = []
    for head, *body in tables:
        pages.append("\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *body]))
    config = model.config
    note = (
        f"{config.n_layers_in_prelude} + {config.n_layers_in_recurrent_block} + {config.n_layers_in_coda} layers, width "
        f"{config.n_embd}, vocabulary {config.vocab_size:,}, {options.turns} turns; torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, "
        f"{torch.backends.cpu.get_cpu_capability()}."
    )
    page = "\n\n".join([*pages, note])
    if options.write is None:
        Console().print(page, soft_wrap=True, highlight=False, markup=False)
        return
    replace_table(options.write, Path(__file__).name, page)


if __name__ == "__main__":
    main()
