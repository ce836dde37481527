"""What depth buys on tasks that need it: small looped models beside controls, from scratch.

Each run trains one model on one task with one seed and writes what it measured as one JSON file; what is there is not
run again. `--write docs/results.md` puts the tables into the page.

    OMP_NUM_THREADS=1 python benchmarks/depth_tasks.py --out runs/depth-tasks
    python benchmarks/depth_tasks.py --out runs/depth-tasks --write docs/results.md
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pages import replace_table

from redepth.checkpoint.cost import count_parameters, training_flops_per_token
from redepth.checkpoint.folder import write_json
from redepth.data.tasks import ArrayTask, open_task
from redepth.evaluation.problems import compact_batches
from redepth.evaluation.tasks import task_accuracy
from redepth.healing.from_scratch import TaskTraining, save_task_model, task_config, train_on_task

TASKS = {
    "roots": "task:roots?depth=0-5&nodes=12",
    "variables": "task:variables?depth=0-5&lines=12&modulus=3",
    "iterate": "task:iterate?depth=1-5&nodes=12",
    "addition": "task:addition?depth=0-5&places=14",
}
DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
UPDATES = {"roots": 700, "variables": 1200, "iterate": 900, "addition": 400}
PROBLEMS = 256  # of each split, to measure on
STEPS_SHOWN = (1, 2, 6, 8, 12)
FEWEST = 50  # answers of a difficulty that counts
CRITERION, THRESHOLD = "kl", 0.05


@dataclass(frozen=True)
class Run:
    """One row of the table.

    Attributes:
        layers: of prelude, core and coda.
        flops_of: train as many updates as take the FLOPs of that run with the same seed.
        feed_back: run the whole model again on its own answers, in place of steps.
    """

    means: str
    training: TaskTraining
    layers: tuple[int, int, int] = (1, 1, 0)
    flops_of: str = ""
    feed_back: bool = False
    tasks: tuple[str, ...] = tuple(TASKS)


EVERY_STEP = TaskTraining("every-step")
STATIC = TaskTraining("last", num_steps=1)
RUNS = {
    "looped": Run("looped, a label for every step", EVERY_STEP),
    "static": Run("the same layers without recurrence, same tokens", STATIC),
    "static-flops": Run("the same layers without recurrence, same FLOPs", STATIC, flops_of="looped"),
    "scratchpad": Run(
        "the same layers without recurrence, intermediate results written out", TaskTraining("scratchpad", num_steps=1)
    ),
    "rerun": Run(
        "the same layers without recurrence, trained to make one step and run again on its own answers",
        TaskTraining("every-step", num_steps=1, window=1),
        feed_back=True,
        tasks=("roots",),
    ),
    "unshared": Run("9 layers as the looped model runs at r = 8, none shared, same tokens", STATIC, layers=(1, 8, 0)),
    "last": Run("looped, a label for the last step alone", TaskTraining("last")),
}


@torch.no_grad()
def accuracy_of_scratchpads(model: Any, task: ArrayTask, seed: int) -> tuple[dict[int, float], dict[int, float]]:
    """By difficulty: the share of answers that greedy writing ends in, and how many tokens are written."""
    hits: dict[int, list[bool]] = {}
    written: dict[int, list[int]] = {}
    for split, least in (("held-out", 0), ("harder", task.depth[1] + 1)):
        batch = task.scratchpad_batch(split, PROBLEMS // 4, seed)
        told = batch.prompts.flatten(0, 1)
        ids, ended = told, torch.zeros(len(told), dtype=torch.bool)
        lengths = torch.zeros(len(told), dtype=torch.long)
        answers = torch.full((len(told),), -1)
        for _ in range(task.range_of("harder")[1] + 3):
            following = model(ids, num_steps=1, use_cache=False).logits[:, -1].argmax(-1)
            lengths += ~ended
            ended |= following == task.end_id
            answers = torch.where(ended, answers, following)
            ids = torch.cat([ids, following[:, None]], 1)
        right = (answers == batch.right.flatten()) & ended
        for difficulty, hit, length in zip(
            batch.difficulty.flatten().tolist(), right.tolist(), lengths.tolist(), strict=True
        ):
            if difficulty >= least:
                hits.setdefault(difficulty, []).append(hit)
                written.setdefault(difficulty, []).append(length)
    return tuple({d: statistics.mean(found[d]) for d in sorted(found)} for found in (hits, written))  # type: ignore[return-value]


@torch.no_grad()
def accuracy_fed_back(model: Any, task: ArrayTask, seed: int) -> dict[int, list[float]]:
    """By difficulty, accuracy after each of DEPTHS runs of the whole model, each asking about the last one's answers."""
    found: dict[int, list[float]] = {}
    for batch in compact_batches(task, PROBLEMS, seed):
        ids, by_runs = batch.ids.clone(), []
        for number in range(1, DEPTHS[-1] + 1):
            logits = model(ids, num_steps=1, use_cache=False).logits
            places = ids.shape[1] - task.usual_questions
            ids[:, places:] = logits[:, places:, : task.nodes].argmax(-1)  # type: ignore[attr-defined]
            if number in DEPTHS:
                by_runs.append(ids[batch.row, batch.place] == batch.label)
        right = torch.stack(by_runs)
        for difficulty in batch.difficulty.unique().tolist():
            chosen = batch.difficulty == difficulty
            found.setdefault(difficulty, []).append((right[:, chosen].sum(1), int(chosen.sum())))  # type: ignore[arg-type]
    return {
        difficulty: (sum(hits for hits, _ in parts) / sum(count for _, count in parts)).tolist()  # type: ignore[union-attr,misc]
        for difficulty, parts in sorted(found.items())
    }


def run_one(task_name: str, run_name: str, seed: int, out: Path) -> None:
    """Train and measure one model, unless that is done."""
    file = out / f"{task_name}-{run_name}-{seed}.json"
    if file.exists():
        return
    run, task = RUNS[run_name], open_task(TASKS[task_name])
    assert isinstance(task, ArrayTask)
    config = task_config(task, layers=run.layers, num_steps=1 if run.training.num_steps else task.depth[1] + 3)
    training = replace(run.training, seed=seed, updates=UPDATES[task_name])
    count = count_parameters(config)
    if run.flops_of:
        other = json.loads((out / f"{task_name}-{run.flops_of}-{seed}.json").read_text())
        tokens = other["record"]["tokens"] / other["record"]["updates"]
        updates = round(other["record"]["flops"] / (training_flops_per_token(count, 0, 1) * tokens))
        training = replace(training, updates=updates)
    print(f"{file.stem}: {training}", flush=True)
    began = time.process_time()
    model, record = train_on_task(task, config, training)
    found: dict[str, Any] = {
        "task": task.spec,
        "run": run_name,
        "training": asdict(training),
        "record": asdict(record),
        "processor_seconds": time.process_time() - began,
        "parameters": count.by_part(),
    }
    if run.training.supervision == "scratchpad":
        found["accuracy"], found["written"] = accuracy_of_scratchpads(model, task, seed=1)
    elif run.feed_back:
        found["fed_back"] = accuracy_fed_back(model, task, seed=1)
    else:
        looped = training.num_steps != 1
        measured = task_accuracy(
            model,
            task,
            compact_batches(task, PROBLEMS, seed=1),
            task.depth[1],
            DEPTHS if looped else (1,),
            CRITERION if looped else None,
            THRESHOLD,
        )
        found["measured"] = measured.as_dict()
    if run_name == "looped" and seed == 0:
        save_task_model(model, task, training, record, out / f"{task_name}-model", overwrite=True)
    write_json(file, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/depth-tasks"), help="folder of the results")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--seeds", type=int, default=3, help="how many of each run's seeds")
    parser.add_argument("--write", type=Path, help="page to put the tables into, instead of running")
    options = parser.parse_args()
    if options.write:
        replace_table(options.write, Path(__file__).name, tables(options.out))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for run_name in options.runs:
        for seed in range(options.seeds):
            for task_name in options.tasks:
                if task_name in RUNS[run_name].tasks:
                    run_one(task_name, run_name, seed, options.out)


def found_of(folder: Path, task_name: str, run_name: str) -> list[dict[str, Any]]:
    """What the seeds of a run measured, as far as they are there."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob(f"{task_name}-{run_name}-[0-9].json"))]


def by_steps(found: dict[str, Any]) -> dict[int, dict[int, float]]:
    """Accuracy by difficulty and number of steps (of runs, of the model fed back; 1 where there are no steps)."""
    if "fed_back" in found:
        return {int(d): dict(zip(DEPTHS, row, strict=True)) for d, row in found["fed_back"].items()}
    if "accuracy" in found:
        return {int(d): {1: value} for d, value in found["accuracy"].items()}
    measured = found["measured"]
    rows = zip(measured["difficulties"], measured["accuracy"], strict=True)
    return {d: dict(zip(measured["num_steps"], row, strict=True)) for d, row in rows}


def mean_over(found: list[dict[str, Any]], steps: int, difficulties: list[int]) -> str:
    """Per cent right, each difficulty counting alike: mean of the seeds and, in brackets, the lowest and highest."""
    values = []
    for one in found:
        table = by_steps(one)
        values.append(100 * statistics.mean(table[d][steps] for d in difficulties if d in table))
    spread = f" ({min(values):.0f} – {max(values):.0f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def flops_per_answer(found: dict[str, Any], task: ArrayTask, steps: int, difficulties: list[int]) -> float:
    """Forward FLOPs of the layers for one problem with one question, its scratchpad included where there is one."""
    parts = found["parameters"]
    tokens = task.statement(task.problems("train", 1)).shape[1] + task.asked(task.problems("train", 1)).shape[2]
    one_pass = 2.0 * (parts["prelude"] + steps * parts["core"] + parts["coda"])
    if "fed_back" in found:
        one_pass = 2.0 * steps * (parts["prelude"] + parts["core"] + parts["coda"])
    if "written" in found:
        tokens += statistics.mean(length for d, length in found["written"].items() if int(d) in difficulties)
    return tokens * one_pass


def tables(folder: Path) -> str:
    """For each task one table of runs and one of the looped model's accuracy by difficulty and steps."""
    parts = []
    for task_name, spec in TASKS.items():
        task = open_task(spec)
        assert isinstance(task, ArrayTask)
        looped = found_of(folder, task_name, "looped")
        if not looped:
            continue
        measured, most = looped[0]["measured"], task.depth[1]
        counted = [d for d, n in zip(measured["difficulties"], measured["answers"], strict=True) if n >= FEWEST]
        hard = [d for d in counted if most // 2 < d <= most]
        harder = [d for d in counted if d > most]
        trained_steps = looped[0]["record"]["most_steps"]
        head = (
            f"### {task_name}\n`{spec}`: {looped[0]['parameters']['total']:,} parameters, trained on difficulties up to {most} "
            f"with at most {trained_steps} steps."
        )
        rows = [
            f"| run | seeds | r | difficulty {hard[0]} – {hard[-1]}, the hard half | MFLOPs per answer | "
            f"{harder[0]} – {harder[-1]}, never trained | updates | training TFLOPs | processor minutes |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for run_name, run in RUNS.items():
            found = found_of(folder, task_name, run_name)
            if not found:
                continue
            steps_of = STEPS_SHOWN if run_name in ("looped", "last", "rerun") else (1,)
            records = [one["record"] for one in found]
            for steps in steps_of:
                first = steps == steps_of[0]
                cells = [
                    f"`{run_name}`: {run.means}" if first else "",
                    str(len(found)) if first else "",
                    str(steps),
                    mean_over(found, steps, hard),
                    f"{statistics.mean(flops_per_answer(one, task, steps, hard) for one in found) / 1e6:.1f}",
                    mean_over(found, steps, harder),
                    f"{statistics.mean(record['updates'] for record in records):.0f}" if first else "",
                    f"{statistics.mean(record['flops'] for record in records) / 1e12:.2f}" if first else "",
                    f"{statistics.mean(one['processor_seconds'] for one in found) / 60:.1f}" if first else "",
                ]
                rows.append("| " + " | ".join(cells) + " |")
        grid = [
            "| difficulty | " + " | ".join(f"r = {steps}" for steps in DEPTHS) + " | exit step | right at exit |",
            "| --- |" + " --- |" * (len(DEPTHS) + 2),
        ]
        for number, difficulty in enumerate(measured["difficulties"]):
            if difficulty not in counted:
                continue
            cells = [f"{100 * statistics.mean(by_steps(one)[difficulty][r] for one in looped):.1f}" for r in DEPTHS]
            exits = [one["measured"]["exits"] for one in looped]
            cells.append(f"{statistics.mean(one['mean_steps'][number] for one in exits):.2f}")
            cells.append(f"{100 * statistics.mean(one['accuracy'][number] for one in exits):.1f}")
            grid.append(f"| {difficulty}{'' if difficulty <= most else ' *'} | " + " | ".join(cells) + " |")
        ends = [one["measured"]["exits"] for one in looped]
        said = (
            f"Adaptive exit (`{CRITERION}` below {THRESHOLD}, at most {DEPTHS[-1]} steps): "
            f"{100 * statistics.mean(one['overall'] for one in ends):.1f} % right over all, against "
            f"{100 * statistics.mean(one['overall_fixed'] for one in ends):.1f} % at r = {DEPTHS[-1]} for every token; Spearman of "
            f"difficulty and steps {statistics.mean(one['spearman'] for one in ends):.2f}. Means of {len(ends)} seeds; * not trained."
        )
        parts += [head, "", *rows, "", *grid, "", said, ""]
    return "\n".join(parts).rstrip()


if __name__ == "__main__":
    main()
