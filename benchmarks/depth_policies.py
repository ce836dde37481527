"""Every depth policy beside fixed depth, in one run: speed, steps, agreement with the deepest, and held-out loss.

    redepth calibrate OUT --most-steps 32
    python benchmarks/depth_policies.py OUT
    python benchmarks/depth_policies.py OUT --data heal.parquet --write docs/depth.md

Greedy decoding of the same prompts under each policy, taken in turns, the prompt's prefill included; medians over the turns,
with the spread. *Agreement* is
the share of a policy's tokens that r = 32 would have picked after the same text. *Loss* is of held-out text fed token by
token, so that a cache rule and an exit test act as they do in decoding; speculation's is that of the depth it verifies at.
*Products* is the share of the time that the matrix products with weights take by themselves, at the fixed depths. Steps and
agreement are of the larger batch.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from pages import replace_table
from rich.console import Console
from rich.progress import track
from torch.nn import functional as F
from turns import products

from redepth import RecurrentDepthCache, RecurrentDepthForCausalLM, load
from redepth.checkpoint.load import load_tokenizer
from redepth.data.rows import held_out_text
from redepth.modeling import DepthPolicy
from redepth.modeling.exits import EXIT_TESTS

DEEPEST = 32
FIXED = (2, 3, 4, 8, 16, DEEPEST)


def policies(config: Any) -> dict[str, dict[str, Any]]:
    """What to measure, by label."""
    chosen: dict[str, dict[str, Any]] = {f"r = {r}": {"num_steps": r} for r in FIXED}
    calibrated = (config.depth_profile or {}).get("thresholds", {})
    for name in EXIT_TESTS:
        for threshold in ("auto", "99%"):
            if threshold == "auto" or calibrated.get(name, {}).get(threshold) is not None:
                chosen[f"`{name}`, {threshold}"] = {"criterion": name, "exit_threshold": threshold}
    for rule in ("ring-1", "ring-4", "first-4-then-last", "latest+ring-4", "skip"):
        # A rule for exited tokens means something only where tokens exit.
        exits = {"criterion": "latent-diff"} if "+" in rule or rule == "skip" else {}
        chosen[f"`{rule}`" + (", `latent-diff`" if exits else "")] = {"cache_rule": rule} | exits
    chosen["warm start, `latent-diff`"] = {"criterion": "latent-diff", "continuous_compute": True}
    for steps in (1, 2, 4):
        chosen[f"draft at {steps}"] = {"draft_steps": steps}
    for settings in ({"inner_steps": 4}, {"inner_steps": 2, "headway": 2}, {"inner_steps": 8}):
        label = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())
        chosen[f"wavefront, {label}"] = {"sampler": "wavefront"} | settings
    return {label: {"num_steps": DEEPEST} | policy for label, policy in chosen.items()}


@torch.no_grad()
def loss_in_decoding(model: RecurrentDepthForCausalLM, tokens: torch.Tensor, policy: dict[str, Any]) -> float | None:
    """Held-out loss in nats, each token fed by itself; None for a sampler, which has no distribution of its own."""
    if "sampler" in policy:
        return None
    policy = {name: value for name, value in policy.items() if name != "draft_steps"}
    resolved = DepthPolicy.resolve(model.config, **policy)
    cache, total = RecurrentDepthCache(model.config, resolved.cache_rule.name), 0.0
    for now, then in zip(tokens[:, :-1].split(1, 1), tokens[:, 1:].split(1, 1), strict=True):
        logits = model(now, past_key_values=cache, policy=resolved).logits[:, -1].float()
        total += F.cross_entropy(logits, then[:, 0], reduction="sum").item()
    return total / (tokens.numel() - len(tokens))


@torch.no_grad()
def picked_by_the_deepest(model: RecurrentDepthForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> float:
    """The share of the tokens after the prompts, whose mask is given, that r = 32 would have picked."""
    start = mask.shape[1]
    whole = F.pad(mask, (0, ids.shape[1] - 1 - start), value=1)
    logits = model(
        ids[:, :-1], attention_mask=whole, num_steps=DEEPEST, use_cache=False, logits_to_keep=ids.shape[1] - start
    ).logits
    return (logits.argmax(-1) == ids[:, start:]).float().mean().item()


def seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measure(
    model: Any, batches: dict[int, dict[str, torch.Tensor]], text: torch.Tensor, tokens: int, turns: int
) -> list:
    """A line for each policy; every figure of the table."""
    chosen = policies(model.config)
    options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    times: dict[tuple[str, int], list[float]] = {}
    outputs: dict[tuple[str, int], Any] = {}
    for turn in range(turns + 1):
        for label, policy in track(chosen.items(), f"turn {turn} of {turns}", transient=True):
            for rows, batch in batches.items():
                # The first turn warms up with few tokens.
                extra = {"max_new_tokens": 4} if turn == 0 else {}
                took = seconds(
                    lambda: outputs.update({(label, rows): model.generate(**batch, **options | policy | extra)})  # noqa: B023
                )
                if turn:
                    times.setdefault((label, rows), []).append(took)
    floors = {}
    for r in FIXED:
        for rows, batch in batches.items():
            prompt = products(model, batch["input_ids"].numel(), r, batch["input_ids"].numel())
            one_more = products(model, rows, r, rows)
            floors[f"r = {r}", rows] = min(seconds(prompt) for _ in range(3)) + (tokens - 1) * min(
                seconds(one_more) for _ in range(5)
            )
    lines, losses = [], {}
    for label, policy in track(chosen.items(), "agreement and held-out loss", transient=True):
        line = [label]
        for rows in batches:
            took, deepest = times[label, rows], times[f"r = {DEEPEST}", rows]
            median = statistics.median(took)
            spread = (max(took) - min(took)) / median / 2
            floor = floors.get((label, rows))
            share = f"{floor / median:.0%}" if floor else ""
            line += [
                f"{rows * tokens / median:.1f} ± {spread:.0%}",
                f"{statistics.median(deepest) / median:.2f} ×",
                share,
            ]
        rows = max(batches)
        output, start = outputs[label, rows], batches[rows]["input_ids"].shape[1]
        agreement = picked_by_the_deepest(model, output.sequences, batches[rows]["attention_mask"])
        # What decodes losslessly has the loss of its depth, and one loss serves both.
        key = str({name: value for name, value in policy.items() if name != "draft_steps"})
        if key not in losses:
            losses[key] = loss_in_decoding(model, text, policy)
        loss = losses[key]
        steps = output.stats["num_steps"][:, start:].float().mean().item()
        lines.append([*line, f"{steps:.1f}", f"{agreement:.1%}", f"{loss:.3f}" if loss is not None else ""])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", default="python-docs")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=32, help="decoded for each prompt")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--loss-tokens", type=int, default=96, help="of held-out text in each of 8 rows")
    parser.add_argument("--kernels", action="store_true", help="decode by the kernels for few tokens; fp32")
    parser.add_argument("--write", type=Path, help="a page whose table to replace")
    options = parser.parse_args()
    model = load(options.checkpoint, options.dtype, few_token_kernels=options.kernels)
    tokenizer = load_tokenizer(options.checkpoint)
    text = held_out_text(tokenizer, options.data, "text", max(options.loss_tokens, 64), 16)
    prompts = text[8:, :48]
    mask = torch.ones_like(prompts)
    for row in range(len(prompts)):
        mask[row, : 2 * row] = 0  # prompts of 34 to 48 tokens, padded on the left
    batches = {
        rows: {"input_ids": prompts[:rows] * mask[:rows], "attention_mask": mask[:rows]} for rows in (1, len(prompts))
    }
    lines = measure(model, batches, text[:8, : options.loss_tokens], options.tokens, options.turns)
    heads = ["policy"]
    for rows in batches:
        heads += [f"tokens/s, batch {rows}", "against r = 32", "products"]
    heads += ["mean steps", "agreement", "loss"]
    table = [heads, ["---"] * len(heads), *lines]
    page = "\n".join("| " + " | ".join(line) + " |" for line in table)
    core = model.config.n_layers_in_recurrent_block
    note = (
        f"{options.tokens} new tokens, {options.turns} turns, {options.dtype}{', kernels' * options.kernels}, {core} layers in the core, greedy; "
        f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads, "
        f"{platform.machine()}, "
        f"{torch.backends.cpu.get_cpu_capability()}."
    )
    if options.write is None:
        Console().print(page + "\n\n" + note, soft_wrap=True, highlight=False, markup=False)
        return
    replace_table(options.write, Path(__file__).name, f"{page}\n\n{note}")


if __name__ == "__main__":
    main()
