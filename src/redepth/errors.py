"""The one exception that redepth raises for a user's mistake or a broken input, and what else counts as one."""

import sys

from safetensors import SafetensorError


class RedepthError(ValueError):
    """What is wrong, with the offending name and value, and what to do, in one line.

    Attributes:
        exit_code: of a command that ends with it.
    """

    exit_code = 2


def first_line(error: BaseException) -> str:
    """Another library's message, cut to what fits in redepth's one line."""
    return str(error).strip().partition("\n")[0]


def one_line(error: BaseException) -> str:
    """Another library's message, all of it, in redepth's one line."""
    return " ".join(str(error).split())


def is_mistake(error: BaseException) -> bool:
    """Whether an exception is the user's, the input's or the machine's, and not a bug of redepth's.

    A missing file, a full disk, exhausted memory and damaged weights are reported in the words of the library that noticed.
    """
    modelling = sys.modules.get("redepth.modeling.errors")  # not imported for a command that runs no model
    mistakes: tuple[type[BaseException], ...] = (RedepthError, OSError, SafetensorError, MemoryError)
    if modelling is not None:
        mistakes += (modelling.UserError,)
    return isinstance(error, mistakes) or "out of memory" in str(error) or "can't allocate memory" in str(error)
