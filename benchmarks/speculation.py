"""Self-speculative decoding beside plain decoding: milliseconds a token, what was accepted, and what the layer counts allow.

    python benchmarks/speculation.py                      # a random model of SmolLM2's shape, every draft right
    python benchmarks/speculation.py OUT --json out.json  # and a checkpoint's own drafts on real text
    python benchmarks/speculation.py --kernels            # all of it, plain decoding too, by the kernels for few tokens

*all right*: the adapter passes the prelude's output on alone (`inject`), so that every depth says the same and every draft is
accepted. *own*: the checkpoint as it is, on held-out text. Plain and drafted decoding take turns over the same prompts; medians
over prompts and turns. *floor* is the time of the matrix products of both and nothing else, in the same run, at the number of
tokens a round that was measured; *layers* counts each layer of a pass once, however many tokens it has.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from turns import CLOCKS, model_of, parser_of, products, write_measurements

from redepth import RecurrentDepthForCausalLM
from redepth.checkpoint.load import load_tokenizer
from redepth.data.rows import held_out_text


def inject_alone(model: RecurrentDepthForCausalLM) -> None:
    """Let every step begin from the prelude's output alone, so that all depths are one."""
    width = model.config.n_embd
    with torch.no_grad():
        model.transformer.adapter.weight.copy_(torch.cat([torch.zeros(width, width), torch.eye(width)], dim=1))


def layers_of(config: Any, num_steps: int, draft_steps: int, k: int, narrow: bool) -> float:
    """How many times fewer layers a token of a round of k accepted drafts takes than one of plain decoding."""
    ends, core = config.n_layers_in_prelude + config.n_layers_in_coda, config.n_layers_in_recurrent_block
    deep = ends + num_steps * core
    begun = 0 if narrow else config.n_layers_in_prelude + draft_steps * core
    drafts = k * (ends + draft_steps * core) + begun
    return deep * (k + 1) / (drafts + deep - begun)


def floor_of(
    model: RecurrentDepthForCausalLM, num_steps: int, draft_steps: int, k: int, repeats: int, now: Callable[[], float]
) -> tuple[float, float]:
    """Milliseconds a token of the products alone: of plain decoding, and of a round of k accepted drafts."""
    runs = {
        "plain": products(model, 1, num_steps, 1),
        "draft": products(model, 1, draft_steps, 1),
        "deep": products(model, k + 1, num_steps, k + 1),
    }
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            started = now()
            run()
            best[name] = min(best[name], 1e3 * (now() - started))
    return best["plain"], (k * best["draft"] + best["deep"]) / (k + 1)


def generated(model: Any, ids: torch.Tensor, tokens: int, **policy: Any) -> Any:
    return model.generate(
        ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None, return_dict_in_generate=True, **policy
    )


def measured(
    model: RecurrentDepthForCausalLM,
    prompts: list[torch.Tensor],
    policies: dict[str, dict[str, Any]],
    tokens: int,
    repeats: int,
    now: Callable[[], float],
) -> dict[str, dict[str, Any]]:
    """For each policy milliseconds a token, the prompt's prefill left out, and its counts of drafts."""
    found: dict[str, dict[str, Any]] = {}
    for name, policy in policies.items():
        generated(model, prompts[0], 4, **policy)  # twins are made, pages are touched
        found[name] = {"times": [], "rounds": 0, "drafted": 0, "accepted": 0, "equal": 0, "of": 0}
    for _ in range(repeats):
        for ids in prompts:
            plain = None
            for name, policy in policies.items():
                clock = [now()]
                short = generated(model, ids, 1, num_steps=policy["num_steps"])  # the prefill
                clock.append(now())
                output = generated(model, ids, tokens, **policy)
                clock.append(now())
                assert short is not None
                entry, stats = found[name], output.stats
                entry["times"].append(1e3 * (clock[2] - 2 * clock[1] + clock[0]) / (tokens - 1))
                plain = plain if plain is not None else output.sequences
                entry["equal"] += int((output.sequences == plain).long().cumprod(-1).sum()) - ids.shape[1]
                entry["of"] += tokens
                for count in ("rounds", "drafted", "accepted"):
                    entry[count] += stats.get(count, 0)
    return found


def main() -> None:
    parser = parser_of(__doc__)
    parser.set_defaults(layers=[12, 6, 12])
    parser.add_argument("--data", default="python-docs")
    parser.add_argument("--num-steps", type=int, default=32)
    parser.add_argument("--draft-steps", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--draft-tokens", type=int, help="a round; as many as pay off by default")
    parser.add_argument("--tokens", type=int, default=133, help="decoded after each prompt")
    parser.add_argument("--context", type=int, default=48, help="tokens of a prompt")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kernels", action="store_true", help="decode by the kernels for few tokens")
    parser.add_argument("--only", choices=["all-right", "own"], nargs="+", default=["all-right", "own"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    now, console, results = CLOCKS[options.clock], Console(width=130), []
    policies: dict[str, dict[str, Any]] = {"plain": {"num_steps": options.num_steps}}
    for steps in options.draft_steps:
        for bits in (None, 8):
            name = f"draft at {steps}" + (", 8 bits" if bits else "")
            policies[name] = {"num_steps": options.num_steps, "draft_steps": steps}
            more = {"draft_bits": bits, "draft_tokens": options.draft_tokens}
            policies[name] |= {key: value for key, value in more.items() if value is not None}

    for case in options.only:
        if case == "own" and options.folder is None:
            continue
        model = model_of(options.folder, tuple(options.layers), options.seed, dtype="float32")
        if options.folder is not None:
            text = held_out_text(load_tokenizer(options.folder), options.data, "text", max(options.context, 64), 16)
            prompts = [row[None, : options.context] for row in text[: options.prompts]]
        else:
            generator = torch.Generator().manual_seed(options.seed)
            prompts = list(torch.randint(3, 1_000, (options.prompts, 1, options.context), generator=generator))
        if case == "all-right":
            inject_alone(model)
        if options.kernels and not model.use_few_token_kernels():
            raise SystemExit("--kernels can't run this model here; see the warning above")
        found = measured(model, prompts, policies, options.tokens, options.repeats, now)
        title = f"{case}: r = {options.num_steps}, {options.tokens} tokens, {options.threads} threads, {options.clock}"
        title += ", kernels" if options.kernels else ""
        table = Table(title=title, title_justify="left")
        for column in ("", "ms a token", "faster", "floor", "layers", "accepted", "a round", "equal to plain"):
            table.add_column(column, justify="right" if column else "left")
        plain = statistics.median(found["plain"]["times"])
        for name, entry in found.items():
            median = statistics.median(entry["times"])
            row = {"case": case, "policy": name, "ms": round(median, 2), "faster": round(plain / median, 2)}
            row |= {"lowest": round(min(entry["times"]), 2), "highest": round(max(entry["times"]), 2)}
            row["equal"] = round(entry["equal"] / entry["of"], 4)
            if entry["rounds"]:
                kept, drafted, rounds = (entry[count] for count in ("accepted", "drafted", "rounds"))
                k = max(round(drafted / rounds), 1)
                steps = policies[name]["draft_steps"]
                floors = floor_of(model, options.num_steps, steps, k, 5, now)
                layers = layers_of(model.config, options.num_steps, steps, k, "draft_bits" in policies[name])
                row |= {"accepted": round(kept / drafted, 4), "drafts_a_round": round(drafted / rounds, 1)}
                row |= {"floor_faster": round(floors[0] / floors[1], 2), "layers_faster": round(layers, 2)}
            results.append(row)
            drawn = [f"{row[key]:.2f} ×" if key in row else "" for key in ("faster", "floor_faster", "layers_faster")]
            share = f"{row['accepted']:.1%}" if "accepted" in row else ""
            table.add_row(
                name, f"{median:.1f}", *drawn, share, str(row.get("drafts_a_round", "")), f"{row['equal']:.1%}"
            )
        console.print(table)
    write_measurements(options, results)


if __name__ == "__main__":
    main()
