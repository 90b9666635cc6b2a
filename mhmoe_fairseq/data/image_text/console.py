"""What the commands on pictures say, and what Pillow is kept from saying."""

from __future__ import annotations

import logging
import sys


def say(line: str) -> None:
    """One line for the user, at once even into a pipe."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def silence_pillow() -> None:
    """Importing TorchScale's dependencies sets the root logger to DEBUG, where Pillow logs every chunk of a file."""
    logging.getLogger("PIL").setLevel(logging.WARNING)
