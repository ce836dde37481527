"""lm-eval's tasks, found by name in its folder and run on its own data or on local files.

lm-eval's index parses all of its fourteen thousand task files, which takes minutes on a slow machine. A task's name stands
on a line of its own in its file, so the text alone says which files are worth parsing.
"""

import difflib
import importlib.util
import re
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from redepth.errors import RedepthError, first_line
from redepth.runtime import require

NAME_LINE = re.compile(r"^[\"']?(?:task|group)[\"']?:[ \t]*[\"']?([\w.:-]+)[\"']?[ \t]*(?:#.*)?$", re.MULTILINE)
MEMBER_LINE = re.compile(r"^[ \t]*-[ \t]+(?:(?:task|group):[ \t]*)?[\"']?([\w.:-]+)[\"']?[ \t]*$", re.MULTILINE)
SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
# What a stock task says of its hub data, and a local file is not: boolq's task reads SuperGLUE's rows, with a label; the
# rows of the set itself have an answer, true or false.
OWN_KEYS = {"boolq": {"doc_to_target": "{{label if label is defined else answer | int}}"}}
SPLIT = "validation"


@cache
def task_texts() -> dict[Path, str]:
    """Every task file of the installed lm-eval."""
    require("lm_eval", "eval")
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0]) / "tasks"
    return {file: file.read_text(encoding="utf-8") for file in sorted(root.rglob("*.yaml"))}


@cache
def task_files() -> dict[str, Path]:
    """The file of each task and group, by its name."""
    found: dict[str, Path] = {}
    for file, text in task_texts().items():
        for name in NAME_LINE.findall(text):
            found.setdefault(name, file)
    return found


def files_with_tag(tag: str) -> list[Path]:
    pattern = re.compile(rf"^[\"']?(?:tag[\"']?:)?[ \t]*(?:-[ \t]+)?[\"']?{re.escape(tag)}[\"']?[ \t]*$", re.MULTILINE)
    return [file for file, text in task_texts().items() if tag in text and pattern.search(text)]


def check_known(names: Sequence[str]) -> None:
    """
    Raises:
        RedepthError: for a name that is no task, group or tag of lm-eval, with the nearest ones.
    """
    for name in names:
        if name not in task_files() and not files_with_tag(name):
            near = difflib.get_close_matches(name, task_files(), n=3, cutoff=0.7)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "lm-eval ls tasks lists them"
            raise RedepthError(f"unknown task {name!r}; {hint}")


def local_file(name: str, folder: Path) -> Path:
    """The file in `folder` with a task's rows: of the task's name, or of its data's (gsm8k for gsm8k_cot).

    Raises:
        RedepthError: where there is none.
    """
    file = task_files().get(name)
    said = (
        re.findall(r"^[\"']?dataset_path[\"']?:[ \t]*[\"']?([\w./-]+)", task_texts()[file], re.MULTILINE)
        if file
        else []
    )
    stems = [name, *(path.rpartition("/")[2] for path in said)]
    for stem in stems:
        for suffix in SUFFIXES:
            if (folder / f"{stem}{suffix}").is_file():
                return folder / f"{stem}{suffix}"
    raise RedepthError(
        f"{folder} has no {stems[0]}.jsonl with the rows of task {name!r}; add it, or leave --data-dir out"
    )


def local_changes(name: str, rows: Path) -> dict[str, Any]:
    """What makes lm-eval's task `name` read one local file, all of which is asked."""
    return {
        "dataset_path": SUFFIXES[rows.suffix],
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {SPLIT: str(rows.resolve())}},
        "training_split": None,
        "validation_split": SPLIT,
        "test_split": None,
        # A task that brings its own examples takes them only where no split is named.
        "fewshot_split": None if re.search(r"^ +samples:", task_texts()[task_files()[name]], re.MULTILINE) else SPLIT,
        **OWN_KEYS.get(name, {}),
    }


def load_tasks(
    names: Sequence[str], data_dir: Path | None = None, changes: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Any]:
    """lm-eval's Task and Group objects for some names.

    Args:
        data_dir: a folder with a file of rows for each task, in the schema of its hub data; nothing is fetched then.
        changes: by task, keys of its configuration to change.

    Raises:
        RedepthError: for an unknown task, a missing file, a group with `data_dir`, or data that can't be loaded.
    """
    check_known(names)
    files = {name: local_file(name, data_dir) for name in names} if data_dir is not None else {}
    grouped = [name for name in names if is_group(name)]
    if files and grouped:
        raise RedepthError(f"task {grouped[0]!r} is a group; with --data-dir name its tasks one by one")
    from lm_eval.tasks import TaskManager

    found: list[Any] = []
    for name in names:
        changed = (local_changes(name, files[name]) if files else {}) | dict((changes or {}).get(name, {}))
        try:
            if name in grouped:
                loaded = TaskManager(include_defaults=False, include_path=folders_of(name)).load([name])
            elif changed:
                with tempfile.TemporaryDirectory() as folder:
                    over = Path(folder) / f"{name}.yaml"
                    over.write_text(yaml.safe_dump({"include": str(task_files()[name]), "task": name, **changed}))
                    loaded = TaskManager(include_defaults=False).load([str(over)])
            else:
                loaded = TaskManager(include_defaults=False).load([str(task_files()[name])])
        except Exception as error:  # of datasets, its readers, the hub, or the task's own code
            hint = "" if files else "; where there is no hub, give local files with --data-dir"
            raise RedepthError(f"task {name!r} can't be loaded: {first_line(error)}{hint}") from None
        groups = loaded.get("groups", {})
        found += [groups[name]] if name in groups else list(loaded["tasks"].values())
    return found


def is_group(name: str) -> bool:
    """Whether lm-eval has several tasks under this name: a group or a tag."""
    file = task_files().get(name)
    if file is None:
        return True
    return (
        re.search(rf"^[\"']?group[\"']?:[ \t]*[\"']?{re.escape(name)}\b", task_texts()[file], re.MULTILINE) is not None
    )


def folders_of(name: str) -> list[str | Path]:
    """The folders whose task files a group or tag needs: its own, and those of whatever stands below it."""
    waiting, seen, folders = [name], {name}, set()
    while waiting:
        one = waiting.pop()
        file = task_files().get(one)
        folders |= {file.parent} if file is not None else {each.parent for each in files_with_tag(one)}
        if file is not None and is_group(one):
            below = set(MEMBER_LINE.findall(task_texts()[file]))
            waiting += below - seen
            seen |= below
    # A folder is read with all below it.
    return [folder for folder in sorted(folders) if not folders & set(folder.parents)]
