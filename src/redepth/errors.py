"""The one exception that redepth raises for a user's mistake or a broken input."""


class RedepthError(ValueError):
    """What is wrong, with the offending name and value, and what to do, in one line."""
