"""What the analysis commands say, and what they keep others from saying."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator


def say(line: str) -> None:
    """One line for the user, at once even into a pipe."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Other packages' messages below WARNING, and PyTorch's remark on a missing accelerator, stay away."""
    loggers = [logging.getLogger(name) for name in ("fairseq", "fairseq_cli", "mhmoe_fairseq", "matplotlib", "PIL")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*pin_memory.*", category=UserWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
