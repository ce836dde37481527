"""The one exception that the modelling files raise for a caller's mistake."""


class UserError(ValueError):
    """What is wrong, with the offending name and value, and what to do, in one line."""
