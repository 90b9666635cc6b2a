"""The checkpoint that fairseq will start a training from, looked at before the training is set up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..models._checkpoints import read_checkpoint
from ..training import check_pretrained

RESUMED = "checkpoint_last.pt"  # fairseq's default: a run of the same task, in --save-dir


def check_starting_checkpoint(model: nn.Module, args: Any) -> None:
    """Compare the files of ``--finetune-from-model`` and ``--restore-file``, if there are any, with the model.

    Args:
        model: in training, with its heads.
        args: the task's flags.

    Raises:
        ValueError: as ``check_pretrained``.
    """
    for name in (args.finetune_from_model, args.restore_file):
        if name and name != RESUMED and Path(name).is_file():
            check_pretrained(model, Path(name), read_checkpoint(Path(name))["model"], args.data)


def resumed_checkpoint(args: Any) -> Path | None:
    """The file of ``--restore-file``, in ``--save-dir`` unless it is given as a path; None if there is none."""
    path = Path(args.save_dir, RESUMED) if args.restore_file == RESUMED else Path(args.restore_file)
    return path if path.is_file() else None
