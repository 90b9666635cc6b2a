"""Checkpoint files read without trust: tensors and plain values only, and one clear line if there is none to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..data.tensor_files import load_tensors, without_wrapper


def read_checkpoint(file: Path) -> dict[str, Any]:
    """fairseq's checkpoint, its tensors mapped from the disk and not read yet, its weights under the model's names.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no checkpoint of fairseq's.
    """
    loaded = load_tensors(file, mmap=True)
    if not isinstance(loaded, dict) or not {"model", "cfg"} <= loaded.keys():
        raise UserError(f"{file}: no readable checkpoint (it has no model and configuration of fairseq)")
    return {**loaded, "model": without_wrapper(loaded["model"])}
