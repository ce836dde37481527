"""RecurrentGemma beside transformers' own class: prefill, decoding and a training step, with the floor of the products.

    python benchmarks/recurrent_gemma.py                     # 1k and 4k tokens, the small shape
    python benchmarks/recurrent_gemma.py --shape wide --dtype bfloat16
    python benchmarks/recurrent_gemma.py --long --json out.json

Both models hold the same random weights and take turns; the medians of the turns are reported. The floor is the time of
the products with weights alone: what would be left if attention, the recurrence and everything else cost nothing.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch.nn.functional import linear

from redepth.griffin import RecurrentGemmaConfig, RecurrentGemmaForCausalLM
from redepth.griffin.configuration import block_type

SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "vocab_size": 32_000,
        "hidden_size": 512,
        "intermediate_size": 1_536,
        "num_attention_heads": 8,
        "num_hidden_layers": 6,
    },
    # Width, heads and window of recurrentgemma-2b, with one pattern of layers out of nearly nine.
    "wide": {
        "vocab_size": 8_000,
        "hidden_size": 2_560,
        "intermediate_size": 15_360,
        "num_attention_heads": 10,
        "num_hidden_layers": 3,
    },
}
DECODED = 32


def median_times(turns: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, taken in turns after one unmeasured round."""
    times: dict[str, list[float]] = {name: [] for name in turns}
    for repeat in range(repeats + 1):
        for name, run in turns.items():
            started = time.perf_counter()
            run()
            if repeat:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def matrix_products(config: Any, rows: int, head_rows: int, dtype: torch.dtype) -> Callable[[bool], None]:
    """A function that runs a pass over `rows` tokens: its products with weights, with `True` their gradients' too."""
    width, head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
    mlp, lru, heads = config.intermediate_size // 2, config.lru_width, config.num_attention_heads
    dense = [(rows, width, mlp), (rows, width, mlp), (rows, mlp, width)] * config.num_hidden_layers
    recurrent = sum(block_type(config, layer) == "recurrent" for layer in range(config.num_hidden_layers))
    dense += [(rows, width, lru), (rows, width, lru), (rows, lru, width)] * recurrent
    attention = config.num_hidden_layers - recurrent
    kv_width = config.num_key_value_heads * head_dim
    dense += [(rows, width, width), (rows, width, width), (rows, width, kv_width), (rows, width, kv_width)] * attention
    dense.append((head_rows, width, config.vocab_size))
    operands = {(n, k): torch.randn(n, k, dtype=dtype) for n, k, _ in dense}
    operands |= {(n, m): torch.randn(n, m, dtype=dtype) for n, _, m in dense}
    weights = [torch.randn(m, k, dtype=dtype) for _, k, m in dense]
    gate_x = torch.randn(heads, rows, lru // heads, dtype=dtype)
    gate_w = torch.randn(heads, lru // heads, lru // heads, dtype=dtype)

    def run(with_gradients: bool) -> None:
        for (n, k, m), weight in zip(dense, weights, strict=True):
            linear(operands[n, k], weight)
            if with_gradients:
                operands[n, m] @ weight
                operands[n, m].T @ operands[n, k]
        for _ in range(recurrent * 2 * (3 if with_gradients else 1)):
            torch.bmm(gate_x, gate_w)

    return run


def make_pair(shape: dict[str, Any], dtype: torch.dtype, seed: int) -> tuple[RecurrentGemmaForCausalLM, Any]:
    torch.manual_seed(seed)
    settings = shape | {"num_key_value_heads": 1}
    ours = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**settings)).eval().to(dtype)
    theirs = transformers.RecurrentGemmaForCausalLM(transformers.RecurrentGemmaConfig(**settings)).eval().to(dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def measure_prefill(ours: Any, theirs: Any, ids: torch.Tensor, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    products = matrix_products(ours.config, ids.shape[1], 1, dtype)
    with torch.inference_mode():
        return median_times(
            {
                "redepth": lambda: ours(ids, logits_to_keep=1, use_cache=True),
                "transformers": lambda: theirs(ids, logits_to_keep=1, use_cache=True),
                "products": lambda: products(False),
            },
            repeats,
        )


def measure_decoding(ours: Any, theirs: Any, ids: torch.Tensor, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Seconds a token, after a prompt of `ids`."""
    products = matrix_products(ours.config, 1, 1, dtype)
    token, length = ids[:, :1], ids.shape[1]
    with torch.inference_mode():
        our_cache = ours(ids, logits_to_keep=1, use_cache=True).past_key_values
        their_cache = transformers.DynamicCache(config=theirs.config)
        theirs.model._setup_cache(theirs.config, 1, "cpu", dtype)
        theirs(ids, logits_to_keep=1, use_cache=True, past_key_values=their_cache)

        def decode_theirs() -> None:
            for step in range(DECODED):
                position = torch.tensor([[length + step]])
                theirs(token, use_cache=True, past_key_values=their_cache, position_ids=position)

        times = median_times(
            {
                "redepth": lambda: [ours(token, use_cache=True, past_key_values=our_cache) for _ in range(DECODED)],
                "transformers": decode_theirs,
                "products": lambda: [products(False) for _ in range(DECODED)],
            },
            repeats,
        )
    return {name: seconds / DECODED for name, seconds in times.items()}


def measure_training(ours: Any, theirs: Any, ids: torch.Tensor, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    products = matrix_products(ours.config, ids.numel(), ids.numel(), dtype)

    def step(model: Any) -> None:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()

    def run_products() -> None:
        with torch.inference_mode():
            products(True)

    runs = {"redepth": lambda: step(ours), "transformers": lambda: step(theirs), "products": run_products}
    return median_times(runs, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--long", action="store_true", help="16,384 tokens too")
    everything = ["prefill", "decode", "train"]
    parser.add_argument("--only", choices=everything, nargs="+", default=everything)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the measurements there")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    ours, theirs = make_pair(SHAPES[options.shape], dtype, options.seed)
    vocabulary = ours.config.vocab_size
    prompts = [1_024, 4_096] + [16_384] * options.long
    cases: list[tuple[str, Callable[..., dict[str, float]], tuple[int, int]]] = []
    if "prefill" in options.only:
        cases += [(f"prefill {tokens:,}", measure_prefill, (1, tokens)) for tokens in prompts]
    if "decode" in options.only:
        lengths = [1_024] + [16_384] * options.long
        cases += [(f"a token after {tokens:,}", measure_decoding, (1, tokens)) for tokens in lengths]
    if "train" in options.only:
        cases.append(("training step 2 × 1,024", measure_training, (2, 1_024)))

    millions = sum(parameter.numel() for parameter in ours.parameters()) / 1e6
    table = Table(title=f"{options.shape}, {millions:.0f} M parameters, {options.dtype}, {options.threads} threads")
    for column in ("", "redepth ms", "transformers ms", "faster", "products ms", "of the products"):
        table.add_column(column, justify="right" if column else "left")
    console, results = Console(width=120), []
    for name, measure, size in cases:
        ids = torch.randint(1, vocabulary, size, generator=torch.Generator().manual_seed(options.seed))
        with console.status(name):
            times = measure(ours, theirs, ids, dtype, options.repeats)
        faster, over = times["transformers"] / times["redepth"], times["redepth"] / times["products"]
        milliseconds = {key: round(1e3 * seconds, 2) for key, seconds in times.items()}
        results.append({"case": name, **milliseconds, "faster": round(faster, 2), "of_products": round(over, 2)})
        table.add_row(
            name,
            f"{milliseconds['redepth']:,}",
            f"{milliseconds['transformers']:,}",
            f"{faster:.2f} ×",
            f"{milliseconds['products']:,}",
            f"{over:.2f} ×",
        )
    console.print(table)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    versions["python"] = platform.python_version()
    console.print(", ".join(f"{name} {version}" for name, version in versions.items()))
    if options.json:
        settings = {key: value for key, value in vars(options).items() if key != "json"}
        options.json.write_text(json.dumps({"settings": settings, "versions": versions, "results": results}, indent=2))


if __name__ == "__main__":
    main()
