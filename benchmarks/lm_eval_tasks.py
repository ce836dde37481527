"""Task files for lm-eval that read local .jsonl files instead of the hub.

    python benchmarks/lm_eval_tasks.py EVAL_FOLDER TASKS_FOLDER
    lm_eval run --model hf --model_args pretrained=./smollm2-retrofit,trust_remote_code=True,num_steps=4 \
        --include_path TASKS_FOLDER --tasks arc_easy_local,sciq_local

Each NAME.jsonl in EVAL_FOLDER holds the rows of lm-eval's own task NAME in their hub schema. The task is lm-eval's, included
as it is; the file alone is ours. Needs `pip install lm-eval`.
"""

import argparse
from pathlib import Path

import yaml

SUFFIX = "_local"
# The stock task reads SuperGLUE's rows; the set's own say true and false.
OWN_KEYS = {"boolq": {"doc_to_target": "{{answer | int}}"}}


def stock_tasks() -> dict[str, Path]:
    """The YAML file of each single task that comes with lm-eval, by its name."""
    from lm_eval.tasks import TaskManager

    index = TaskManager().task_index
    return {name: Path(entry.yaml_path) for name, entry in index.items() if entry.yaml_path is not None}


def local_task(name: str, stock: Path, rows: Path) -> dict[str, object]:
    """lm-eval's task `name` on the rows of one .jsonl file."""
    return {
        "include": str(stock.resolve()),
        "task": name + SUFFIX,
        "tag": [],
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": str(rows.resolve())}},
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
        "fewshot_split": "validation",
        **OWN_KEYS.get(name, {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of NAME.jsonl files")
    parser.add_argument("out", type=Path, help="folder to write the task files to")
    arguments = parser.parse_args()
    files = sorted(arguments.data.glob("*.jsonl"))
    if not files:
        parser.error(f"{arguments.data} holds no .jsonl file; name the folder with the evaluation sets")
    stock = stock_tasks()
    unknown = [rows.stem for rows in files if rows.stem not in stock]
    if unknown:
        parser.error(f"lm-eval has no task named {', '.join(unknown)}; name each file after its task")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for rows in files:
        task = local_task(rows.stem, stock[rows.stem], rows)
        (arguments.out / f"{task['task']}.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
        print(task["task"])


if __name__ == "__main__":
    main()
