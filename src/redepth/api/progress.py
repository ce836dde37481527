"""How a verb says how far it is."""

from collections.abc import Callable

# Called with the name of a part and its share done, from 0 to 1.
OnProgress = Callable[[str, float], None]


def shares(on_progress: OnProgress | None, part: str) -> Callable[[int, int], None]:
    """A listener to (done, total) that passes the share on, if anybody listens."""
    return (
        (lambda done, total: on_progress(part, done / total)) if on_progress is not None else (lambda done, total: None)
    )
