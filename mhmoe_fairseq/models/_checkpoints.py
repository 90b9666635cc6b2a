"""Checkpoint files read without trust: tensors and plain values only, and one clear line if there is none to read."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError


def read_checkpoint(file: Path) -> dict[str, Any]:
    """fairseq's checkpoint, its tensors mapped from the disk and not read yet.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no checkpoint of fairseq's.
    """
    try:
        loaded = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file}: no readable checkpoint ({reason})") from error
    if not isinstance(loaded, dict) or not {"model", "cfg"} <= loaded.keys():
        raise UserError(f"{file}: no readable checkpoint (it has no model and configuration of fairseq)")
    return loaded
