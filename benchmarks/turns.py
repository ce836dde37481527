"""What the benchmarks of speed share: things timed in turns, their floor, a model of SmolLM2's shape, the machine's name.

The *floor* of a pass is the time of its matrix products with weights and nothing else: attention, norms, the cache, Python
and all the rest would be free. It is timed in the same process, in turns with what it is the floor of.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional as F

from redepth import RecurrentDepthConfig, RecurrentDepthForCausalLM, load
from redepth.modeling.quantizer import quantize_model

# Width, heads, mlp and vocabulary of SmolLM2-135M.
SMOLLM2 = {
    "vocab_size": 49_152,
    "n_embd": 576,
    "n_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1_536,
    "block_size": 8_192,
    "norm_placement": "pre",
    "qk_bias": False,
    "rope_style": "half",
    "norm_before_coda": False,
    "initial_state_mode": "embed",
    "tie_embeddings": True,
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """What every benchmark of speed asks for: the model, threads, the clock, a file for the figures."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=Path, nargs="?", help="a checkpoint; a random model of SmolLM2's shape by default"
    )
    parser.add_argument("--layers", type=int, nargs=3, default=[4, 6, 4], metavar=("PRELUDE", "CORE", "CODA"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for a busy machine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the measurements there")
    return parser


def write_measurements(options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Settings, machine and results into the file that `--json` names, if it names one."""
    if options.json is not None:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        text = json.dumps({"settings": settings, "machine": machine(), "results": results}, indent=2)
        options.json.write_text(text, encoding="utf-8")


def smollm2_shaped(layers: tuple[int, int, int], seed: int = 0) -> RecurrentDepthForCausalLM:
    """A random model of SmolLM2's shape with so many layers in prelude, core and coda."""
    torch.manual_seed(seed)
    names = ("n_layers_in_prelude", "n_layers_in_recurrent_block", "n_layers_in_coda")
    return RecurrentDepthForCausalLM(RecurrentDepthConfig(**SMOLLM2 | dict(zip(names, layers, strict=True)))).eval()


def model_of(
    folder: Path | None, layers: tuple[int, int, int], seed: int, **settings: Any
) -> RecurrentDepthForCausalLM:
    """The checkpoint in a folder, loaded with `settings`, or a random model of SmolLM2's shape."""
    return smollm2_shaped(layers, seed) if folder is None else load(folder, **settings).eval()


def with_kernels(model: RecurrentDepthForCausalLM, quantization: Any = None) -> RecurrentDepthForCausalLM:
    """A copy that decodes by the kernels for few tokens.

    Args:
        quantization: a `DepthQuantizationConfig`; None for the weights as they are.

    Raises:
        SystemExit: where the kernels can't run.
    """
    model = copy.deepcopy(model)
    if quantization is not None:
        quantize_model(model, quantization)
    if not model.use_few_token_kernels():
        raise SystemExit("the kernels for few tokens can't run this model here; see the warning above")
    return model


def in_turns(runs: dict[str, Callable[[], Any]], repeats: int, clock: str = "wall") -> dict[str, dict[str, float]]:
    """Milliseconds of each, taken in turns after one unmeasured round: median, first and third quartile.

    Args:
        clock: `wall`, or `cpu` for the processor time of this process, which a busy machine disturbs less.
    """
    now, times = CLOCKS[clock], {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            started = now()
            run()
            if repeat:
                times[name].append(1e3 * (now() - started))
    return {name: spread(values) for name, values in times.items()}


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles, rounded to a microsecond where the values are milliseconds."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": round(statistics.median(values), 3), "low": round(low, 3), "high": round(high, 3)}


def products(model: RecurrentDepthForCausalLM, tokens: int, num_steps: int, head_tokens: int) -> Callable[[], None]:
    """The matrix products of a pass over so many tokens, and nothing else: what its floor is the time of."""
    stack = model.transformer

    def weights(layers: Any) -> list[torch.Tensor]:
        return [part.weight for part in layers.modules() if isinstance(part, torch.nn.Linear)]

    core = [stack["adapter"].weight, *weights(stack["core_block"])]
    used = weights(stack["prelude"]) + num_steps * core + weights(stack["coda"])
    inputs = {weight.shape[1]: torch.randn(tokens, weight.shape[1], dtype=weight.dtype) for weight in used}
    head, last = model.lm_head.weight, torch.randn(head_tokens, model.config.n_embd, dtype=model.dtype)

    @torch.inference_mode()
    def run() -> None:
        for weight in used:
            F.linear(inputs[weight.shape[1]], weight)
        F.linear(last, head)

    return run


def machine() -> dict[str, Any]:
    """What a measurement depends on beside the code."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return {
        "processor": names[0].partition(":")[2].strip() if names else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
