"""The one exception that redepth raises for a user's mistake or a broken input."""


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
