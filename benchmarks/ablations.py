"""What each choice of a retrofit does, one change at a time: the runs behind the table in docs/results.md.

    python benchmarks/ablations.py --data heal/train.parquet --validation heal/validation.parquet --out ablations
    python benchmarks/ablations.py … --only base static fixed          # some of them
    python benchmarks/ablations.py --out ablations --write docs/results.md   # the finished ones, as a table

Each run converts SmolLM2-135M and heals it on 62 × 8 × 512 = 253,952 tokens, a quarter of an hour on one core. A run that is
finished is not done again, and one that was broken off goes on. `static` trains the same layers without recurrence.
"""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pages import replace_table

from redepth.checkpoint.folder import HEALING_FILE
from redepth.healing.heal import heal
from redepth.healing.recipe import HealRecipe
from redepth.surgery.convert import plan_conversion

SOURCE = "smollm2-135m"
CONVERT = {"core": "12:18", "adapter": "blend:0.25"}
HEAL = {
    "separate_documents": False,
    "sequence_length": 512,
    "batch_size": 8,
    "micro_batch_size": 4,
    "max_steps": 62,
    "learning_rate": 1e-4,
    "mean_recurrence": 4,
    "eval_rows": 32,
    "compile": True,
    "report_to": "none",
}
# The least hurt of the plans without four layers that `redepth plan` tried with a core of 6 (dev/LOG.md).
FOUR_DROPPED = {"prelude": "0:4", "core": "8:14", "coda": "14:30", "adapter": "blend:0.2"}
NO_RECURRENCE = {"depth_sampling": "fixed", "mean_recurrence": 1, "curriculum": "constant", "eval_depths": (1,)}


@dataclass(frozen=True)
class Run:
    """What differs from the base, in words and in keys of the recipe."""

    change: str
    convert: dict[str, Any] = field(default_factory=dict)
    heal: dict[str, Any] = field(default_factory=dict)


RUNS = {
    "base": Run("core 12:18, `blend:0.25`, state `embed`, mean r from 1 to 4"),
    "blend0.1": Run("`blend:0.1`", {"adapter": "blend:0.1"}),
    "blend0.5": Run("`blend:0.5`", {"adapter": "blend:0.5"}),
    "inject": Run("`inject`", {"adapter": "inject"}),
    "published-start": Run("`random`, state `noise`, as published", {"adapter": "random", "state": "noise"}),
    "noise": Run("state `noise`", {"state": "noise"}),
    "paper": Run("first, late middle, last: 0:6, 14:24, 24:30", {"prelude": "0:6", "core": "14:24", "coda": "24:30"}),
    "influence": Run(
        "the 8 layers of least block influence dropped",
        {"prelude": "0:3,4:7", "core": "7:12,16:17,18:22", "coda": "22:25,27:30"},
    ),
    "early": Run("core 5:11, `blend:0.1`", {"core": "5:11", "adapter": "blend:0.1"}),
    "four": Run("4 layers dropped as `redepth plan` proposes: 0:4, 8:14, 14:30, `blend:0.2`", FOUR_DROPPED),
    "four-deep": Run(
        "`four` with a mean r of 6 throughout", FOUR_DROPPED, {"curriculum": "constant", "mean_recurrence": 6}
    ),
    "four-static": Run("`four` without recurrence, the same tokens", FOUR_DROPPED, NO_RECURRENCE),
    "four-static-flops": Run(
        "`four` without recurrence, the FLOPs of `four` (101 steps)", FOUR_DROPPED, NO_RECURRENCE | {"max_steps": 101}
    ),
    "distill": Run("half of the loss from the source", heal={"distill": 0.5}),
    "fixed": Run("r = 4 from the start", heal={"depth_sampling": "fixed", "curriculum": "constant"}),
    "static": Run("no recurrence, the same tokens", heal=NO_RECURRENCE),
    "static-flops": Run("no recurrence, the same FLOPs (96 steps)", heal=NO_RECURRENCE | {"max_steps": 96}),
}


def run(name: str, options: argparse.Namespace) -> None:
    """Convert and heal one of `RUNS`; what is there already is not done again."""
    folder, chosen = options.out / name, RUNS[name]
    if (folder / HEALING_FILE).exists():
        return
    if not (folder / "config.json").exists():
        plan_conversion(SOURCE, **CONVERT | chosen.convert).write(folder)
    texts = {"data": options.data, "validation": options.validation, "seed": options.seed}
    heal(folder, HealRecipe(**texts | HEAL | chosen.heal))


def table(out: Path) -> str:
    """The finished runs in markdown, the losses after healing by r and, in brackets, before."""
    found = {
        name: json.loads((out / name / HEALING_FILE).read_text())
        for name in RUNS
        if (out / name / HEALING_FILE).exists()
    }
    depths = list(map(str, HealRecipe().eval_depths))
    lines = [
        "| run | change | FLOPs | " + " | ".join(f"r = {depth}" for depth in depths) + " |",
        "| --- | --- | --- |" + " --- |" * len(depths),
    ]
    for name, result in found.items():
        cells = [
            f"{result['loss_after'][depth]:.3f} ({result['loss_before'][depth]:.3f})"
            if depth in result["loss_after"]
            else ""
            for depth in depths
        ]
        share = result["flops"] / found["static"]["flops"] if "static" in found else float("nan")
        lines.append(f"| `{name}` | {RUNS[name].change} | {share:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="text to train on, as `redepth heal --data`")
    parser.add_argument("--validation", help="held-out text")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs, one folder each")
    parser.add_argument("--only", nargs="*", choices=[*RUNS], default=[*RUNS], help="runs to do; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="a page whose table to replace, without running anything")
    options = parser.parse_args()
    if options.write is None:
        if not options.data or not options.validation:
            parser.error("give --data and --validation, or --write for the table of finished runs")
        for name in options.only:
            run(name, options)
            print(f"{name} finished")
        print(table(options.out))
        return
    replace_table(options.write, Path(__file__).name, table(options.out))


if __name__ == "__main__":
    main()
