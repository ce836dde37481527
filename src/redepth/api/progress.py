"""How a verb reports its progress."""

from collections.abc import Callable

# Called with the name of a part and its share done, from 0 to 1.
OnProgress = Callable[[str, float], None]


def shares(on_progress: OnProgress | None, part: str) -> Callable[[int, int], None]:
    """A callback for (done, total) that passes the share to `listen`, where there is one."""
    return (
        (lambda done, total: on_progress(part, done / total)) if on_progress is not None else (lambda done, total: None)
    )
