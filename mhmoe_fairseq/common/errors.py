"""Errors that are the user's to mend: a command shows them as one clear line. All others are our bugs.

One rule says which class to raise. Could a user cause it, by a flag, a file, data, a checkpoint or the environment?
Then :class:`UserError`, naming what it is about, its value and the rule. Could only code that calls us cause it, by a
tensor of another shape or an argument that does not exist? Then ``ValueError`` or ``TypeError``, with its traceback.
"""


class UserError(ValueError):
    """A bad flag, file or environment: the message names it, its value and the rule it breaks.

    ``mhmoe`` and fairseq's commands print it as one line (``mhmoe: error: ...``) and exit with status 2.
    """


# What the commands show as one line: the system's own errors about a file that the user named are as clear as ours.
USER_ERRORS = (UserError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
