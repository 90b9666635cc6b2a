"""Files of ``torch.save``: read without running anything that is in them, written so that half of one is never left."""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Sequence, TypeVar

import torch

from ..common.errors import UserError
from ..common.files import atomic_open

_WRAPPER = "module."  # of the names that DistributedDataParallel and DataParallel give
_REFUSED = re.compile(r"GLOBAL ([\w.]+)")
Value = TypeVar("Value")


def load_tensors(path: Path, *, what: str = "checkpoint", mmap: bool = False, classes: Sequence[Any] = ()) -> Any:
    """Return what a file of ``torch.save`` holds: tensors and plain values; nothing in it is run.

    Args:
        what: what it should be, for messages.
        mmap: map the tensors and read them when they are used; only of files in today's layout, a zip archive.
        classes: further classes of plain values that may be in it.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: naming the file and what is wrong: the object in it that is refused, or that it is damaged.
    """
    if mmap and path.is_file() and not zipfile.is_zipfile(path):
        raise UserError(f"{path}: no readable {what} (it is not a file of torch.save, or truncated)")
    try:
        with torch.serialization.safe_globals(list(classes)):
            return torch.load(path, map_location="cpu", mmap=mmap or None, weights_only=True)
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # damaged files make the unpickler raise nearly anything
        raise unreadable(path, error, what) from None


def unreadable(path: Path | str, error: Exception, what: str = "checkpoint") -> UserError:
    """Return the error to show for what ``torch.load`` raised.

    It never repeats PyTorch's advice to load the file with ``weights_only=False``, which would run what is in it.
    """
    if found := _REFUSED.search(str(error)):
        return UserError(
            f"{path}: refused, not run: it holds an object of {found[1]}, and only tensors and plain data are read"
        )
    if isinstance(error, pickle.UnpicklingError):
        reason = "it is not a file of torch.save, or holds more than tensors and plain data"
    else:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
    return UserError(f"{path}: no readable {what} ({reason})")


def save_tensors(value: Any, path: Path) -> None:
    """``torch.save``, by :func:`~.files.atomic_open`; ``UserError`` on a full disk."""
    with atomic_open(path) as stream:
        torch.save(value, stream)


def without_wrapper(state: Mapping[str, Value]) -> Mapping[str, Value]:
    """Return a state dictionary without the ``module.`` of DistributedDataParallel, if every name begins so."""
    if not state or not all(isinstance(name, str) and name.startswith(_WRAPPER) for name in state):
        return state
    return type(state)((name.removeprefix(_WRAPPER), value) for name, value in state.items())  # type: ignore[call-arg]
