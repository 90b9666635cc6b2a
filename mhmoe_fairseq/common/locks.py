"""Folders that one run at a time writes to. The kernel frees a lock when its holder ends, however it ends."""

import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import IO

from .errors import UserError

logger = logging.getLogger(__name__)

LOCK = ".lock"
_held: dict[Path, IO[str]] = {}  # for as long as this process lives


def exclusive_lock(path: Path, flag: str) -> IO[str]:
    """Locks a file of a folder and returns it: closing it lets go. Without locks in the file system there is a warning.

    Raises:
        UserError: another run holds it; ``flag`` named the folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  (the caller closes it)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # it is taken
        file.seek(0)
        holder = file.read().strip() or "another run"
        file.close()
        raise UserError(
            f"{flag} {path.parent}: another run is writing there ({holder}); wait for it or choose another folder"
        ) from error
    except OSError as error:
        logger.warning(f"{path}: no lock to be had here ({error.strerror}): nothing keeps a second run out")
        return file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def hold_folder(folder: Path, flag: str) -> None:
    """Keeps other runs out of a folder until this process ends; ``UserError`` if another one holds it already."""
    path = folder.resolve() / LOCK
    if path not in _held:
        _held[path] = exclusive_lock(path, flag)


def _let_go() -> None:
    # Forked processes, such as those that load data, may live a little longer than the run that holds the lock.
    while _held:
        _held.popitem()[1].close()


os.register_at_fork(after_in_child=_let_go)
