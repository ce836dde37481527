"""Tasks by their specs: `task:NAME?option=value&option=value`."""

import dataclasses
import difflib
from typing import Any

from redepth.data.source import TASK_PREFIX, is_task
from redepth.errors import RedepthError
from redepth.modeling.errors import UserError
from redepth.modeling.extensions import is_import_path as is_path
from redepth.modeling.extensions import load_extension, registered_names

from .addition import Addition
from .circuits import Circuits
from .iterate import Iterate
from .protocol import Task
from .reasoning_gym import ReasoningGym
from .roots import Roots
from .variables import Variables

TASKS: dict[str, type[Task]] = {task.name(): task for task in (Iterate, Roots, Circuits, Addition, Variables)}
TASK_GROUP = "redepth.tasks"  # of entry points


def is_import_path(spec: str) -> bool:
    """Whether a spec names its task by import path, which runs code."""
    return is_path(spec.removeprefix(TASK_PREFIX).partition("?")[0])


def open_task(spec: str) -> Task:
    """The task that a spec names.

    Args:
        spec: `task:roots?depth=0-6&nodes=16`; the name is one of `TASKS`, `reasoning-gym/NAME`, a name that an installed
            package registers under `redepth.tasks`, or an import path `package.module:Class`. An option is a field of the task's dataclass; a range is written `1-8`.

    Raises:
        RedepthError: for an unknown task or option, or a value that does not fit.
    """
    if not is_task(spec):
        raise RedepthError(f"{spec!r} is no task; write {TASK_PREFIX}NAME, with NAME one of {', '.join(TASKS)}")
    name, _, given = spec.removeprefix(TASK_PREFIX).partition("?")
    options: dict[str, str] = {}
    for option in filter(None, given.split("&")):
        key, equals, value = option.partition("=")
        if not equals:
            raise RedepthError(f"option {option!r} in {spec!r} has no value; write option=value")
        if key in options:
            raise RedepthError(f"option {key!r} stands twice in {spec!r}; give it once")
        options[key] = value
    if name.startswith(ReasoningGym.short_name + "/"):
        return ReasoningGym(name.partition("/")[2], tuple(sorted(options.items())))
    task_class = _task_class(name, spec)
    fields = {field.name: field for field in dataclasses.fields(task_class)}
    for key in options:
        if key not in fields:
            raise RedepthError(f"{spec!r} has no option {key!r}; {_did_you_mean(key, list(fields))}")
    return task_class(**{key: _parse(value, fields[key].default, key, spec) for key, value in options.items()})


def _task_class(name: str, spec: str) -> type[Task]:
    if name in TASKS:
        return TASKS[name]
    registered = registered_names(TASK_GROUP)
    if not is_path(name) and name not in registered:
        names = [*TASKS, *registered, f"{ReasoningGym.short_name}/NAME", "package.module:Class"]
        raise RedepthError(f"task {name!r} is unknown; {_did_you_mean(name, names)}")
    try:
        found = load_extension(name, TASK_GROUP)
    except UserError as error:
        raise RedepthError(f"task {error}") from error
    if not (isinstance(found, type) and issubclass(found, Task) and dataclasses.is_dataclass(found)):
        raise RedepthError(f"{spec!r} is no task; make it a dataclass that derives from redepth.data.tasks.Task")
    return found


def _did_you_mean(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"use {', '.join(known)}"


def _parse(value: str, default: Any, key: str, spec: str) -> Any:
    """An option's text as what its default is: a range, a whole number, a number or a text."""
    try:
        if isinstance(default, tuple):
            least, _, most = value.partition("-")
            return int(least), int(most or least)
        return type(default)(value)
    except ValueError:
        kind = "a range such as 1-8" if isinstance(default, tuple) else "a number"
        raise RedepthError(f"option {key}={value!r} in {spec!r} should be {kind}") from None
