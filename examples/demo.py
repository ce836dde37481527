"""The main job: a model in which depth visibly pays, trained in front of the user, and a real model given its new depth.

First a small looped model learns to follow chains of links to their end, one link at a step, beside a static control of
the same layers; both are shown by difficulty and number of steps. Then the built-in smollm2-135m is converted, verified,
healed for a little while and made to write at several depths. The commands are those that a user would type. What is
already there is not made again.
"""

import json
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import redepth
from redepth.checkpoint.folder import read_recipe, write_json
from redepth.cli.console import hush_libraries
from redepth.data.tasks import ArrayTask, open_task
from redepth.evaluation.plots import plot_accuracy_by_depth, plot_loss_by_depth
from redepth.evaluation.problems import compact_batches
from redepth.evaluation.tasks import TaskAccuracy, task_accuracy
from redepth.healing.from_scratch import TaskTraining, require_array_task, save_task_model, task_config, train_on_task

FOLDER = Path("demo")
TASK = "task:roots?depth=0-5&nodes=12"
UPDATES = 700
SECONDS = 200  # of training at the most; a slow machine ends before all updates are made
NUM_STEPS = [1, 2, 3, 4, 6, 8, 10, 12]
EXIT_TEST, EXIT_THRESHOLD = "kl", 0.05
TRAININGS = {
    "looped": TaskTraining("every-step", updates=UPDATES, seconds=SECONDS),
    "static": TaskTraining("last", num_steps=1, updates=UPDATES, seconds=SECONDS),
}
EXAMPLE_SEED = 3

SOURCE = "smollm2-135m"
RECIPE = Path(__file__).parent.parent / "recipes" / "demo.yaml"
PROMPT = "The capital of France is"
console = Console()


def run(*words: object) -> None:
    """Run one redepth command, shown as it is typed."""
    console.print(f"\n[bold]$ redepth {' '.join(map(str, words))}[/]", soft_wrap=True)
    subprocess.run([sys.executable, "-m", "redepth", *map(str, words)], check=True)


def train(kind: str, say: Any = None) -> None:
    """Train one of the two small models, unless that is done, on one core."""
    if (FOLDER / kind / "config.json").exists():
        return
    torch.set_num_threads(1)
    hush_libraries()  # the control has a process of its own
    task = require_array_task(open_task(TASK), TASK)
    training = TRAININGS[kind]
    config = task_config(task, num_steps=training.num_steps or task.depth[1] + training.beyond)
    model, record = train_on_task(task, config, training, say)
    save_task_model(model, task, training, record, FOLDER / kind)


def train_both() -> None:
    """The looped model in front of the user, its static control beside it on the other core."""
    control = multiprocessing.get_context("spawn").Process(target=train, args=("static",))
    control.start()
    columns = (TextColumn("looped model"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=1.0, note="")
        train("looped", lambda done, note: progress.update(bar, completed=done, note=note))
        progress.update(bar, completed=1.0)
    control.join()
    if control.exitcode:
        sys.exit("the static control's training failed; its message stands above")


def measure(kind: str, task: ArrayTask) -> TaskAccuracy:
    model: Any = redepth.load(FOLDER / kind)
    looped = kind == "looped"
    batches = compact_batches(task, 192, seed=1)
    depths = NUM_STEPS if looped else [1]
    return task_accuracy(model, task, batches, task.depth[1], depths, EXIT_TEST if looped else None, EXIT_THRESHOLD)


def show_depth(looped: TaskAccuracy, static: TaskAccuracy) -> None:
    """The table of accuracy by difficulty and r."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left", title_justify="left")
    table.title = "Follow the links to the end: right answers in per cent"
    table.caption = (
        f"* further from the end than any node in training (at most {looped.trained_most}). The looped model was trained to "
        "give the node i links on after step i, so too few steps are wrong by design; what counts is where its steps lead. "
        "static: the same layers without recurrence, after as many problems; where two chains are left, guessing gives 50."
    )
    for column in ("links to the end", *(f"r={r}" for r in looped.num_steps), "exit step", "static"):
        table.add_column(column, justify="right")
    assert looped.exits is not None
    for number, difficulty in enumerate(looped.difficulties):
        star = "*" if difficulty > looped.trained_most else " "
        cells = [f"{100 * value:.0f}" for value in looped.accuracy[number]]
        ends = f"{looped.exits.mean_steps[number]:.1f}"
        table.add_row(f"{difficulty}{star}", *cells, ends, f"{100 * static.accuracy[number][0]:.0f}")
    console.print(table)
    console.print(
        f"Adaptive exit ({EXIT_TEST} below {EXIT_THRESHOLD}) takes more steps for harder questions (Spearman "
        f"{looped.exits.spearman:.2f}) and answers {100 * looped.exits.overall:.1f} % right, against "
        f"{100 * looped.exits.overall_fixed:.1f} % at r = {looped.exits.num_steps} for all."
    )


def show_example(task: ArrayTask) -> None:
    """One held-out question, the first of its seed, answered at four depths and by the control."""
    deepest = task.depth[1]
    problem = task.problems("held-out", 1, EXAMPLE_SEED, questions=1, depth=(deepest, deepest))
    words = [task.words[number] for number in (*task.statement(problem)[0], task.asked(problem)[0, 0, 0])]
    route = [task.say(int(node)).strip() for node in task.results(problem, int(problem.difficulty[0, 0]))[:, 0, 0]]
    console.print(f"\nOne question: where does {route[0]} lead in the end? The way is {' → '.join(route)}.")
    asked = " ".join(words)
    run(
        "generate",
        FOLDER / "looped",
        asked,
        *(word for r in (1, 2, 4, 8) for word in ("--num-steps", r)),
        "--max-new-tokens",
        1,
    )
    run("generate", FOLDER / "static", asked, "--num-steps", 1, "--max-new-tokens", 1)


def depth_pays() -> None:
    """Train, measure, draw and write `depth.json`."""
    console.print(
        "[bold]A model in which depth pays.[/] Nodes in chains, each link given in context; the question is where a node "
        "leads in the end. One link a step: the further from the end, the more steps an answer needs."
    )
    task = require_array_task(open_task(TASK), TASK)
    train_both()
    looped, static = measure("looped", task), measure("static", task)
    assert looped.exits is not None
    show_depth(looped, static)
    picture, numbers = FOLDER / "depth.png", FOLDER / "depth.json"
    static_column = [row[0] for row in static.accuracy]
    plot_accuracy_by_depth(
        looped.accuracy,
        looped.difficulties,
        looped.num_steps,
        picture,
        "Links to the end: accuracy by difficulty and steps",
        looped.trained_most,
        looped.exits.mean_steps,
        {"static control": static_column},
    )
    made = {kind: read_recipe(FOLDER / kind)["train_on_task"] for kind in TRAININGS}
    content = {
        "task": looped.task,
        "difficulties": looped.difficulties,
        "trained_most": looped.trained_most,
        "answers": looped.answers,
        "num_steps": looped.num_steps,
        "accuracy": looped.accuracy,
        "standard_error": looped.standard_error,
        "mean_exit_steps": looped.exits.mean_steps,
        "exits": looped.as_dict()["exits"],
        "controls": {
            "static": {"accuracy": static_column, "standard_error": [row[0] for row in static.standard_error]}
        },
        "training": made,
    }
    write_json(numbers, content)
    if made["looped"]["most_steps"] < task.depth[1] + TRAININGS["looped"].beyond:
        console.print(
            f"[yellow]Time ended the training after {made['looped']['updates']} of {UPDATES} updates, at step "
            f"{made['looped']['most_steps']}: the staircase is not complete.[/]"
        )
    show_example(task)
    console.print(f"drawn in {picture}, numbers in {numbers}")


def real_model() -> list[str]:
    """Convert, verify, heal and run a pretrained model; says at which depths healing did not help."""
    folder = FOLDER / "smollm2"
    console.print(f"\n[bold]A real model, {SOURCE}, given a recurrent core.[/]")
    if not (folder / "config.json").exists():
        run("convert", SOURCE, folder)
    if not (folder / "healing.json").exists():
        run("heal", folder, "--data", "python-docs", "--recipe", RECIPE)
    healing = json.loads((folder / "healing.json").read_text(encoding="utf-8"))
    losses = {when: {int(r): loss for r, loss in healing[f"loss_{when}"].items()} for when in ("before", "after")}
    table = Table("", *(f"r = {r}" for r in losses["after"]), title="held-out loss on general text, nats per token")
    for when, curve in losses.items():
        table.add_row(when, *(f"{loss:.3f}" for loss in curve.values()))
    console.print(table)
    plot_loss_by_depth({"every layer kept": losses}, FOLDER / "loss_by_depth.png", f"{SOURCE}: held-out loss by depth")
    console.print("General text asks for little depth at this size; docs/results.md says where it pays and where not.")
    run("generate", folder, PROMPT, *(word for r in (1, 4, 16) for word in ("--num-steps", r)))
    return [f"r = {r}" for r, loss in losses["after"].items() if loss >= losses["before"][r]]


def main() -> None:
    hush_libraries()
    started = time.monotonic()
    FOLDER.mkdir(exist_ok=True)
    depth_pays()
    worse = real_model()
    console.print(f"\ndone in {(time.monotonic() - started) / 60:.1f} minutes")
    if worse:
        sys.exit(f"healing did not lower the loss at: {'; '.join(worse)}")


if __name__ == "__main__":
    main()
