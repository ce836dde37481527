"""Decoding batches whose rows are of unequal length, beside the floor and beside rows of one length.

    python benchmarks/batch.py                         # 8 and 16 rows, r = 4
    python benchmarks/batch.py --threads 1 --clock cpu

The rows' prompts are padded on the left to the longest, and a mask goes with every token, as `generate` does it.
"""

from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from turns import in_turns, machine, model_of, parser_of, products, with_kernels, write_measurements

from redepth import RecurrentDepthForCausalLM


def decoding(model: RecurrentDepthForCausalLM, lengths: torch.Tensor, num_steps: int) -> Any:
    """A function that decodes one more token of each row, after prompts of these lengths."""
    longest = int(lengths.max())
    ids = torch.randint(3, model.config.vocab_size, (len(lengths), longest), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
    cache = model(ids, attention_mask=mask, num_steps=num_steps, use_cache=True, logits_to_keep=1).past_key_values

    def one_more() -> None:
        seen = torch.nn.functional.pad(mask, (0, cache.get_seq_length() + 1 - longest), value=1)
        model(ids[:, -1:], attention_mask=seen, past_key_values=cache, num_steps=num_steps)

    return one_more


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--context", type=int, default=80, help="tokens of the longest row; the shortest has a quarter")
    parser.add_argument("--num-steps", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16, help="timed tokens in each case")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    plain = model_of(options.folder, tuple(options.layers), options.seed)
    models = {"plain": plain, "kernels": with_kernels(plain)}
    console, results = Console(width=120), []
    table = Table(title=f"r = {options.num_steps}, {options.threads} threads, {machine()['processor']}")
    for column in ("rows", "", "floor ms", "one length ms", "of floor", "unequal ms", "of floor"):
        table.add_column(column, justify="right")
    for rows in options.rows:
        lengths = {
            "equal": torch.full((rows,), options.context),
            "unequal": torch.linspace(options.context // 4, options.context, rows).long(),
        }
        runs = {"floor": products(plain, rows, options.num_steps, rows)}
        with torch.inference_mode():
            for name, model in models.items():
                for which, of_rows in lengths.items():
                    runs[f"{name}, {which}"] = decoding(model, of_rows, options.num_steps)
            times = in_turns(runs, options.tokens, options.clock)
        floor = times["floor"]["median"]
        ratios = {f"{name}_of_floor": round(took["median"] / floor, 3) for name, took in times.items()}
        results.append({"rows": rows, **times, **ratios})
        for name in models:
            shown = []
            for which in lengths:
                took = times[f"{name}, {which}"]
                half = (took["high"] - took["low"]) / 2
                shown += [f"{took['median']:.1f} ± {half:.1f}", f"{took['median'] / floor:.2f} ×"]
            table.add_row(str(rows), name, f"{floor:.1f}", *shown)
    console.print(table)
    write_measurements(options, results)


if __name__ == "__main__":
    main()
