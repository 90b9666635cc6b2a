"""Errors that are the user's to mend: the command line turns them into one clear line."""


class UserError(ValueError):
    """A bad flag, file or environment: the message names it, its value and the rule it breaks.

    ``mhmoe`` prints it as one line (``mhmoe: error: ...``) and exits with status 2; in Python it is a
    :class:`ValueError` like any other.
    """
