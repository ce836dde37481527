"""Decoding batches whose rows are of unequal length, beside the floor and beside rows of one length.

    python benchmarks/batch.py                         # 8 and 16 rows, r = 4
    python benchmarks/batch.py --threads 1 --clock cpu

The rows' prompts are padded on the left to the longest, and a mask goes with every token, as `generate` does it.
"""

from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from turns import in_turns, machine, model_of, parser_of, products, write_measurements

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
    model = model_of(options.folder, tuple(options.layers), options.seed)
    console, results = Console(width=120), []
    table = Table(title=f"r = {options.num_steps}, {options.threads} threads, {machine()['processor']}")
    for column in ("rows", "floor ms", "one length ms", "of floor", "unequal ms", "of floor"):
        table.add_column(column, justify="right")
    for rows in options.rows:
        unequal = torch.linspace(options.context // 4, options.context, rows).long()
        with torch.inference_mode():
            runs = {
                "equal": decoding(model, torch.full((rows,), options.context), options.num_steps),
                "unequal": decoding(model, unequal, options.num_steps),
                "floor": products(model, rows, options.num_steps, rows),
            }
            times = in_turns(runs, options.tokens, options.clock)
        floor = times["floor"]["median"]
        ratios = {f"{name}_of_floor": round(times[name]["median"] / floor, 3) for name in ("equal", "unequal")}
        results.append({"rows": rows, **times, **ratios})
        table.add_row(
            str(rows),
            f"{floor:.1f}",
            f"{times['equal']['median']:.1f}",
            f"{ratios['equal_of_floor']:.2f} ×",
            f"{times['unequal']['median']:.1f}",
            f"{ratios['unequal_of_floor']:.2f} ×",
        )
    console.print(table)
    write_measurements(options, results)


if __name__ == "__main__":
    main()
