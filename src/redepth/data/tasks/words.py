"""Names for things in problems."""

import string

from redepth.errors import RedepthError

NAMES = string.ascii_uppercase + string.ascii_lowercase


def letters(count: int) -> list[str]:
    """A, B, C … and then a, b, c …

    Raises:
        RedepthError: for more than 52.
    """
    if count > len(NAMES):
        raise RedepthError(
            f"a problem names its things by single letters, so {count} are too many; use {len(NAMES)} at most"
        )
    return list(NAMES[:count])


def digits(count: int) -> list[str]:
    """0, 1, 2 …, as many as that."""
    return [str(digit) for digit in range(count)]
