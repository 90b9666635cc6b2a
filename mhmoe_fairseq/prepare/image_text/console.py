"""What the commands on images say."""

from __future__ import annotations

import sys


def say(line: str) -> None:
    """One line for the user, at once even into a pipe."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
