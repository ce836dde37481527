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

from .quiet import quiet

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


@cache
def index_of(name: str) -> dict[str, Any]:
    """lm-eval's own entries for a name and what stands below it, with their configurations."""
    from lm_eval.tasks import TaskManager

    with quiet():
        return dict(TaskManager(include_defaults=False, include_path=folders_of(name)).task_index)


def leaves_of(name: str) -> list[str]:
    """The single tasks that lm-eval asks under a name: itself, or those of a group or tag."""
    index = index_of(name)

    def below(one: Any) -> list[str]:
        if isinstance(one, dict):  # described in place
            inside = one.get("task", one.get("group"))
            return [leaf for each in inside for leaf in below(each)] if isinstance(inside, list) else below(inside)
        entry = index.get(one)
        if entry is None or (entry.kind.name in ("TASK", "PY_TASK")):
            return [one]
        members = sorted(entry.tags) if entry.kind.name == "TAG" else entry.cfg["task"]
        return [leaf for each in members for leaf in below(each)]

    return list(dict.fromkeys(below(name)))


def data_of(leaf: str, index: Mapping[str, Any]) -> tuple[str, str]:
    """A single task's data set on the hub, without its owner, and the part of it that it reads; empty where unsaid."""
    config = (index[leaf].cfg or {}) if leaf in index else {}
    return str(config.get("dataset_path") or "").rpartition("/")[2], str(config.get("dataset_name") or "")


def local_files(names: Sequence[str], folder: Path) -> dict[str, Path]:
    """For each single task under some names the file in `folder` with its rows.

    A file is named after the task; or, in a folder named after its data set, after the part that it reads
    (mmlu/anatomy for mmlu_anatomy); or after the data set (gsm8k for gsm8k_cot), where no other task that is asked reads
    another part of it.

    Raises:
        RedepthError: where there is none.
    """
    data = {leaf: data_of(leaf, index_of(name)) for name in names for leaf in leaves_of(name)}
    found = {}
    for leaf, (path, part) in data.items():
        stems = [leaf, f"{path}/{part}"] if part else [leaf]
        if len({other for where, other in data.values() if where == path}) == 1:
            stems.append(path)
        files = [folder / f"{stem}{suffix}" for stem in stems if stem for suffix in SUFFIXES]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            others = "".join(f" or {stem}.jsonl" for stem in stems[1:] if stem)
            raise RedepthError(
                f"{folder} has no {leaf}.jsonl{others} with the rows of task {leaf!r}; add it, or leave --data-dir out"
            )
        found[leaf] = file
    return found


def local_changes(leaf: str, rows: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a single task of lm-eval read one local file, all of which is asked."""
    return {
        "dataset_path": SUFFIXES[rows.suffix],
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {SPLIT: str(rows.resolve())}},
        "training_split": None,
        "validation_split": SPLIT,
        "test_split": None,
        # A task that brings its own examples takes them only where no split is named.
        "fewshot_split": None if (config.get("fewshot_config") or {}).get("samples") else SPLIT,
        **OWN_KEYS.get(leaf, {}),
    }


def load_tasks(
    names: Sequence[str], data_dir: Path | None = None, changes: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Any]:
    """lm-eval's Task and Group objects for some names.

    Args:
        data_dir: a folder with a file of rows for each task, in the schema of its hub data; nothing is fetched then.
        changes: by single task, keys of its configuration to change.

    Raises:
        RedepthError: for an unknown task, a missing file, or data that can't be loaded.
    """
    check_known(names)
    files = local_files(names, data_dir) if data_dir is not None else {}
    found: list[Any] = []
    for name in names:
        try:
            loaded = _load(name, files, changes or {})
        except Exception as error:  # of datasets, its readers, the hub, or the task's own code
            hint = "" if files else "; where there is no hub, give local files with --data-dir"
            raise RedepthError(f"task {name!r} can't be loaded: {first_line(error)}{hint}") from None
        groups = loaded.get("groups", {})
        found += [groups[name]] if name in groups else list(loaded["tasks"].values())
    return found


def _load(name: str, files: Mapping[str, Path], changes: Mapping[str, Mapping[str, Any]]) -> Any:
    """What lm-eval makes of a name, where a folder of changed tasks comes after its own and replaces them."""
    from lm_eval.tasks import TaskManager

    index = index_of(name)
    with tempfile.TemporaryDirectory() as folder:
        for leaf in leaves_of(name):
            entry = index[leaf]
            changed = local_changes(leaf, files[leaf], entry.cfg or {}) if leaf in files else {}
            changed |= dict(changes.get(leaf, {}))
            if changed:
                over = {"include": str(entry.yaml_path), "task": leaf, **changed}
                (Path(folder) / f"{leaf}.yaml").write_text(yaml.safe_dump(over), encoding="utf-8")
        with quiet():
            return TaskManager(include_defaults=False, include_path=[*folders_of(name), folder]).load([name])


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
