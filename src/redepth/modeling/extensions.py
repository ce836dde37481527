"""What others add without a fork: named by import path, or by an entry point of a package that is installed."""

from importlib.metadata import entry_points
from pkgutil import resolve_name
from typing import Any

from .errors import UserError


def is_import_path(name: str) -> bool:
    """Whether it is written `package.module:name`."""
    return ":" in name


def registered_names(group: str) -> list[str]:
    """What installed packages registered under an entry-point group; nothing of it is imported."""
    return sorted(entry_points(group=group).names)


def load_extension(name: str, group: str) -> Any:
    """The object of that import path, or registered under that name; its module is imported, so that its code runs.

    Args:
        name: as the caller gave it. One that a checkpoint brings must not be an import path: it could name any code.
        group: of entry points.

    Raises:
        UserError: for a name that is unknown or that two packages registered, and for what can't be imported.
    """
    if is_import_path(name):
        load, said = (lambda: resolve_name(name)), repr(name)
    else:
        points = {point.value: point for point in entry_points(group=group, name=name)}
        if not points:
            raise UserError(f"no installed package registers {name!r} under {group}")
        if len(points) > 1:
            raise UserError(
                f"{name!r} is registered under {group} by {' and by '.join(sorted(points))}; give the path of one"
            )
        (value, point), *_ = points.items()
        load, said = point.load, f"{name!r}, registered as {value!r},"
    try:
        return load()
    except Exception as error:
        # Importing runs the module, which may fail in any way.
        first = str(error).strip().partition("\n")[0]
        raise UserError(f"{said} can't be imported: {type(error).__name__}: {first}") from error
