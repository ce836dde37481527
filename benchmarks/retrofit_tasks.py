"""What depth buys a retrofit of SmolLM2-135M on a task in words, beside controls without recurrence.

Each run heals the same conversion by `recipes/smollm2-135m-roots.yaml`, with the changes in `RUNS`, and then measures it; what
is done is not done again, and a run that was broken off goes on. `--write docs/results.md` puts the tables into the page.

    OMP_NUM_THREADS=1 python benchmarks/retrofit_tasks.py --out runs/retrofit --text train.parquet --validation validation.parquet
    python benchmarks/retrofit_tasks.py --out runs/retrofit --write docs/results.md
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pages import replace_table
from paired_losses import rows_by_source

from redepth import load
from redepth.checkpoint.cost import count_parameters
from redepth.checkpoint.folder import HEALING_FILE, HEALING_LOG_FILE, read_jsonl, write_json
from redepth.checkpoint.load import load_tokenizer, read_config
from redepth.data.tasks import ArrayTask, is_task, open_task
from redepth.data.tasks.arrays import END
from redepth.evaluation.loss import loss_by_depth
from redepth.evaluation.tasks import evaluate_task, standard_error
from redepth.healing.clock import Progress
from redepth.healing.curriculum import depth_of_step
from redepth.healing.heal import heal
from redepth.healing.recipe import HealRecipe, fill, read_yaml
from redepth.healing.supervision import supervised_steps
from redepth.runtime import has_bf16
from redepth.surgery.convert import plan_conversion

RECIPE = Path(__file__).parent.parent / "recipes" / "smollm2-135m-roots.yaml"
CONVERTED = "converted"  # what every run starts from; at r = 1 it is the source
DEPTHS = (1, 2, 4, 6, 8, 10)
TEXT_DEPTHS = (1, 2, 4, 8)
TEXT_ROWS, TEXT_LENGTH = 2, 256  # of each source of the held-out text
PROBLEMS, QUESTIONS = 48, 16  # of each split, and in each problem
SCRATCHPADS = 128  # problems of each split, of one question each
CRITERION, THRESHOLD = "kl", 0.05


@dataclass(frozen=True)
class Run:
    """One row of the table.

    Attributes:
        changes: in the recipe's section `heal`.
        scratchpad: train on intermediate results written out, and measure by writing them.
        flops_of: train as many steps as take the training FLOPs of that run.
    """

    means: str
    changes: dict[str, Any] = field(default_factory=dict)
    scratchpad: bool = False
    flops_of: str = ""


STATIC = {
    "depth_sampling": "fixed",
    "mean_recurrence": 1,
    "supervision": "last",
    "step_targets": "answer",
    "eval_depths": (1,),
}
RUNS = {
    "looped": Run("looped, a label for every step"),
    "static": Run("no recurrence, the same layers trained, same tokens", STATIC),
    "static-flops": Run("no recurrence, the same layers trained, same FLOPs", STATIC, flops_of="looped"),
    "static-all": Run("no recurrence, all layers trained, same tokens", STATIC | {"train": "all"}),
    "scratchpad": Run(
        "no recurrence, the same layers trained, intermediate results written out, fewer tokens",
        STATIC | {"max_steps": 160},
        scratchpad=True,
    ),
}


def recipe_of(run: Run, text: str | None, validation: str | None) -> HealRecipe:
    """The recipe's section `heal` with a run's changes; `text` in place of python-docs."""
    values = read_yaml(RECIPE)["heal"] | run.changes | {"report_to": "none", "validation": validation}

    def source_of(source: dict[str, Any]) -> dict[str, Any]:
        if is_task(source["data"]):
            return source | {"scratchpad": run.scratchpad}
        return source | {"data": text or source["data"]}

    phases = [phase | {"data": [source_of(source) for source in phase["data"]]} for phase in values["phases"]]
    return fill(HealRecipe, values | {"phases": phases}, RECIPE.name)


def task_of(recipe: HealRecipe) -> ArrayTask:
    task = open_task(recipe.timetable()[0][1][0].data)
    assert isinstance(task, ArrayTask)
    return task


def flops_of_steps(folder: Path, recipe: HealRecipe, num_steps: list[tuple[int, int]]) -> float:
    """Training FLOPs of the layers, for optimiser steps with these (steps without, steps with gradient).

    A frozen layer costs no gradient of its weights, one before the first that trains no backward pass at all, and each
    supervised step its own pass through the coda.
    """
    count = count_parameters(read_config(folder)[0])
    all_train = recipe.train == "all"
    total = 0.0
    for without, with_gradient in num_steps:
        codas = supervised_steps(recipe, (without, with_gradient))
        total += (6 if all_train else 2) * count.prelude
        total += (2 * without + 6 * with_gradient) * count.core
        total += (6 if all_train else 4) * codas * count.coda
    return total * recipe.batch_size * recipe.sequence_length


def num_steps_of(folder: Path, recipe: HealRecipe) -> list[tuple[int, int]]:
    """The depth of every optimiser step of a finished run, as it was drawn."""
    means = [line["mean_recurrence"] for line in read_jsonl(folder / HEALING_LOG_FILE) if "mean_recurrence" in line]
    found: list[tuple[int, int]] = []
    earned: int | None = 1 if recipe.depth_sampling == "earned" else None
    for number, mean in enumerate(means):
        found.append(depth_of_step(recipe, number, number / len(means), earned))
        if earned is not None:  # the mean of the depths drawn up to there, solved for it
            newest = recipe.newest_share
            earned = round((mean - (1 - newest) / 2) / (newest + (1 - newest) / 2))
    return found


def updates_for(flops: float, folder: Path, recipe: HealRecipe) -> int:
    return round(flops / flops_of_steps(folder, recipe, [depth_of_step(recipe, 0, 0.0)]))


@torch.no_grad()
def accuracy_of_scratchpads(
    model: Any, tokenizer: Any, task: ArrayTask, on_batch: Callable[[], None]
) -> dict[str, Any]:
    """By difficulty: the share of answers that greedy writing ends in, and how many tokens are written."""
    hits: dict[int, list[bool]] = {}
    written: dict[int, list[int]] = {}
    for split, least in (("held-out", 0), ("harder", task.depth[1] + 1)):
        texts = [
            text
            for text in task.scratchpads(split, SCRATCHPADS, 1)  # type: ignore[arg-type]
            if text.answers[0].difficulty >= least
        ]
        for start in range(0, len(texts), 64):
            some = texts[start : start + 64]
            # All of one length: the statement and a question.
            told = tokenizer([text.text[: text.answers[0].start] for text in some], return_tensors="pt")["input_ids"]
            longest = task.range_of("harder")[1] + 3
            ids = model.generate(told, num_steps=1, max_new_tokens=longest, do_sample=False)
            for text, row in zip(some, ids[:, told.shape[1] :], strict=True):
                answer = text.answers[0]
                said, ended, _ = tokenizer.decode(row).partition(END)
                right = bool(ended) and said[-1:] == answer.right.removesuffix(END)[-1]
                hits.setdefault(answer.difficulty, []).append(right)
                written.setdefault(answer.difficulty, []).append(len(tokenizer(said + END)["input_ids"]))
            on_batch()
    levels = sorted(hits)
    return {
        "difficulties": levels,
        "answers": [len(hits[level]) for level in levels],
        "num_steps": [1],
        "accuracy": [[statistics.mean(hits[level])] for level in levels],
        "standard_error": [
            standard_error(torch.tensor([hits[level]]).double(), torch.arange(len(hits[level]))).tolist()
            for level in levels
        ],
        "written": [statistics.mean(written[level]) for level in levels],
    }


def text_losses(folder: Path, validation: Path) -> dict[str, float]:
    """Held-out loss in nats by number of steps, over rows of every source of the text."""
    rows = rows_by_source(validation, load_tokenizer(folder), TEXT_LENGTH, TEXT_ROWS)
    with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16()):
        losses = loss_by_depth(load(folder), torch.cat(list(rows.values())), TEXT_DEPTHS)
    return {str(steps): loss for steps, loss in losses.items()}


def tell(name: str, at: Progress, began: float) -> None:
    """Print what the run has to say, and where it is at every twentieth step."""
    if at.part == "training" and (at.remark or at.step % 20 == 0):
        said = at.remark or f"step {at.step}, loss {at.loss}, mean r {at.mean_recurrence}"
        print(f"{name}, {time.process_time() - began:.0f} s: {said}", flush=True)


def run_one(name: str, options: argparse.Namespace) -> None:
    """Heal and measure one run, as far as that is not done."""
    run, folder, file = RUNS[name], options.out / name, options.out / f"{name}.json"
    if file.exists():
        return
    recipe, converted = recipe_of(run, options.text, options.validation), options.out / CONVERTED
    if run.flops_of:
        other = json.loads((options.out / f"{run.flops_of}.json").read_text())
        steps = updates_for(other["training_flops"], converted, recipe)
        recipe = recipe.model_copy(update={"max_steps": steps})
    began = time.process_time()
    if not (folder / HEALING_FILE).exists():
        heal(converted, recipe, out=folder, on_progress=lambda at: tell(name, at, began))
    record = json.loads((folder / HEALING_FILE).read_text())
    task = task_of(recipe)
    found: dict[str, Any] = {
        "task": task.spec,
        "run": name,
        "updates": record["steps"],
        "tokens": record["tokens"],
        "training_flops": flops_of_steps(folder, recipe, num_steps_of(folder, recipe)),
        "parameters": count_parameters(read_config(folder)[0]).by_part(),
        "text": text_losses(folder, Path(options.validation)),
    }
    if run.scratchpad:
        model = load(folder, "bfloat16").eval()
        found["measured"] = accuracy_of_scratchpads(model, load_tokenizer(folder), task, lambda: None)
    else:
        found["measured"] = measured(folder, task, DEPTHS if name == "looped" else (1,))
    write_json(file, found)


def measured(folder: Path, task: ArrayTask, num_steps: tuple[int, ...], criterion: str | None = None) -> dict[str, Any]:
    return evaluate_task(
        folder,
        task.spec,
        num_steps,
        criterion,
        THRESHOLD,
        limit=PROBLEMS,
        questions=QUESTIONS,
        seed=1,
        dtype="bfloat16" if has_bf16() else "float32",
    ).as_dict()


def measure_exits(out: Path) -> None:
    """Adaptive exit of the looped model, unless that is done."""
    file = out / "looped-exits.json"
    if not file.exists():
        task = open_task(json.loads((out / "looped.json").read_text())["task"])
        assert isinstance(task, ArrayTask)
        write_json(file, measured(out / "looped", task, DEPTHS[-1:], CRITERION))


def over(found: dict[str, Any], steps: int, least: int, most: int) -> tuple[float, float] | None:
    """Per cent right from one difficulty to another, each counting alike, and its standard error."""
    measured = found["measured"]
    at = measured["num_steps"].index(steps)
    chosen = [n for n, level in enumerate(measured["difficulties"]) if least <= level <= most]
    if not chosen:
        return None
    error = sum(measured["standard_error"][n][at] ** 2 for n in chosen) ** 0.5 / len(chosen)
    return 100 * statistics.mean(measured["accuracy"][n][at] for n in chosen), 100 * error


def gigaflops_per_answer(found: dict[str, Any], task: ArrayTask, tokens: int, steps: int) -> float:
    """Forward, of the layers, for one problem with one question of the hard half, its scratchpad included."""
    parts, measured = found["parameters"], found["measured"]
    total = float(tokens)
    if "written" in measured:
        hard = range(task.depth[1] // 2 + 1, task.depth[1] + 1)
        rows = zip(measured["difficulties"], measured["written"], strict=True)
        total += statistics.mean(length for level, length in rows if level in hard) - 1  # the last is not read
    return 2e-9 * total * (parts["prelude"] + steps * parts["core"] + parts["coda"])


def tables(out: Path) -> str:
    """One table of the runs, and one of the looped model's accuracy by difficulty and steps."""
    runs = {name: json.loads((out / f"{name}.json").read_text()) for name in RUNS if (out / f"{name}.json").exists()}
    looped = runs["looped"]
    task = open_task(looped["task"])
    assert isinstance(task, ArrayTask)
    text = task.texts("held-out", 1)[0]
    prompt = len(load_tokenizer(out / CONVERTED)(text.text[: text.answers[0].start])["input_ids"])
    most, (_, hardest) = task.depth[1], task.range_of("harder")
    source = json.loads((out / f"{CONVERTED}.json").read_text())["1"]
    rows = [
        f"| run | r | difficulty 1 – {most // 2} | {most // 2 + 1} – {most}, the hard half | {most + 1} – {hardest}, never "
        "trained | GFLOPs per answer | text, nats | updates | training TFLOPs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        f"| the source | | | | | | {source:.3f} | | |",
    ]
    for name, found in runs.items():
        for steps in DEPTHS if name == "looped" else (1,):
            first = steps == 1
            cells = [f"`{name}`: {RUNS[name].means}" if first else "", str(steps)]
            for least, limit in ((1, most // 2), (most // 2 + 1, most), (most + 1, hardest)):
                figures = over(found, steps, least, limit)
                cells.append(f"{figures[0]:.1f} ± {figures[1]:.1f}" if figures else "")
            cells.append(f"{gigaflops_per_answer(found, task, prompt, steps):.1f}")
            loss = found["text"].get(str(steps)) if first or name == "looped" else None
            cells.append(f"{loss:.3f}" if loss is not None else "")
            cells += [str(found["updates"]), f"{found['training_flops'] / 1e12:.0f}"] if first else ["", ""]
            rows.append("| " + " | ".join(cells) + " |")
    measured = looped["measured"]
    file = out / "looped-exits.json"
    exits = json.loads(file.read_text())["exits"] if file.exists() else None
    grid = [
        "| difficulty | answers | "
        + " | ".join(f"r = {steps}" for steps in DEPTHS)
        + (" | exit step | right at exit |" if exits else " |"),
        "| --- | --- |" + " --- |" * (len(DEPTHS) + (2 if exits else 0)),
    ]
    for number, level in enumerate(measured["difficulties"]):
        cells = [f"{100 * value:.0f}" for value in measured["accuracy"][number]]
        if exits:
            cells += [f"{exits['mean_steps'][number]:.2f}", f"{100 * exits['accuracy'][number]:.0f}"]
        star = "" if level <= most else " *"
        grid.append(f"| {level}{star} | {measured['answers'][number]} | " + " | ".join(cells) + " |")
    said = "* not trained."
    if exits:
        said = (
            f"Adaptive exit (`{CRITERION}` below {THRESHOLD}, at most {DEPTHS[-1]} steps): {100 * exits['overall']:.1f} % right over "
            f"all, against {100 * exits['overall_fixed']:.1f} % at r = {DEPTHS[-1]} for every token; Spearman of difficulty and steps "
            f"{exits['spearman']:.2f}. * not trained."
        )
    return "\n".join([*rows, "", *grid, "", said])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/retrofit"), help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="runs to do; all by default")
    parser.add_argument("--text", help="text to train on beside the task, in place of python-docs")
    parser.add_argument("--validation", help="held-out text, .parquet with columns text and source")
    parser.add_argument("--write", type=Path, help="page to put the tables into, instead of running")
    options = parser.parse_args()
    if options.write:
        replace_table(options.write, Path(__file__).name, tables(options.out))
        return
    if not options.validation:
        parser.error("--validation is needed to run; name held-out text")
    torch.set_num_threads(1)
    converted = options.out / CONVERTED
    if not converted.exists():
        plan_conversion(**read_yaml(RECIPE)["convert"]).write(converted)
    if not (options.out / f"{CONVERTED}.json").exists():
        write_json(options.out / f"{CONVERTED}.json", text_losses(converted, Path(options.validation)))
    for name in options.only:
        run_one(name, options)
    if options.only == list(RUNS):
        measure_exits(options.out)


if __name__ == "__main__":
    main()
