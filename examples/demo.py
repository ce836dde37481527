"""The main job, from a pretrained model to text at several depths, with the commands a user would type.

Converts the built-in smollm2-135m under two plans (every layer kept; four layers dropped), verifies and heals both,
shows the held-out loss by depth, draws it, and generates. What is already there is not made again.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from redepth.evaluation.plots import plot_loss_by_depth

SOURCE = "smollm2-135m"
FOLDER = Path("demo")
RECIPE = Path(__file__).parent.parent / "recipes" / "demo.yaml"
PLANS = {
    "every layer kept": [],
    # The least hurt of those that `redepth plan` tried with a core of 6 layers (dev/LOG.md).
    "4 layers dropped": ["--prelude", "0:4", "--core", "8:14", "--coda", "14:30", "--adapter", "blend:0.2"],
}
PROMPT = "The capital of France is"
console = Console()


def run(*words: object) -> None:
    """Run one redepth command, shown as it is typed."""
    console.print(f"\n[bold]$ redepth {' '.join(map(str, words))}[/]")
    subprocess.run([sys.executable, "-m", "redepth", *map(str, words)], check=True)


def folder_of(label: str) -> Path:
    return FOLDER / label.replace(" ", "-")


def make(label: str, options: list[str]) -> dict[str, dict[int, float]]:
    """Convert, verify and heal one plan, unless that is done; its losses before and after."""
    folder = folder_of(label)
    if not (folder / "config.json").exists():
        run("convert", SOURCE, folder, *options)
    if not (folder / "healing.json").exists():
        run("heal", folder, "--data", "python-docs", "--recipe", RECIPE)
    healing = json.loads((folder / "healing.json").read_text())
    return {when: {int(depth): loss for depth, loss in healing[f"loss_{when}"].items()} for when in ("before", "after")}


def main() -> None:
    started = time.monotonic()
    FOLDER.mkdir(exist_ok=True)
    losses = {label: make(label, options) for label, options in PLANS.items()}
    picture = FOLDER / "loss_by_depth.png"
    plot_loss_by_depth(losses, picture, f"{SOURCE}: held-out loss by depth")

    depths = list(next(iter(losses.values()))["after"])
    table = Table("plan", "", *(f"r = {depth}" for depth in depths), title="held-out loss, nats per token")
    for label, curves in losses.items():
        for when, curve in curves.items():
            table.add_row(label, when, *(f"{curve[depth]:.3f}" for depth in depths))
    console.print(table)
    console.print(f"drawn in {picture}")
    run("generate", folder_of("every layer kept"), PROMPT, *(word for r in (1, 4, 16) for word in ("--num-steps", r)))
    console.print(f"\ndone in {(time.monotonic() - started) / 60:.1f} minutes")
    worse = [
        f"{label}, r = {depth}"
        for label, curves in losses.items()
        for depth in depths[1:]
        if curves["after"][depth] >= curves["before"][depth]
    ]
    if worse:
        sys.exit(f"healing did not lower the loss at: {'; '.join(worse)}")


if __name__ == "__main__":
    main()
