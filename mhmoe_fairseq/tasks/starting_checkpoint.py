"""The checkpoint that fairseq will start a training from, looked at before the training is set up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoints.read import read_checkpoint
from ..common.errors import UserError
from ..models.beit3_checkpoints import resized_tables
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


def check_resumed_sizes(model: nn.Module, args: Any) -> None:
    """A run that fairseq resumes with its optimizer has the model's position tables: no weights can be resized then.

    fairseq would load the resized tables beside moments of the old shape, and the first update would fail.

    Args:
        model: an ``MHMoEBEiT3``, in training.
        args: the task's flags.

    Raises:
        UserError: naming the flag, the file and what to do.
    """
    file = resumed_checkpoint(args)
    if file is None or args.reset_optimizer:
        return
    saved = read_checkpoint(file)
    if not saved.get("last_optimizer_state"):
        return
    new_run = f", or begin a new run with --finetune-from-model {file} and another --save-dir"
    for flag, unit, before, now in resized_tables(model, saved["model"]):
        is_longer = flag == "--max-text-length" and now > before  # which a new run is refused, too
        raise UserError(
            f"{flag} ({getattr(args, flag[2:].replace('-', '_'))}): the model has positions for {now} {unit}, {file} "
            f"has them for {before}, and its optimizer's state cannot be resumed with another number: give {flag} as "
            f"in its training{'' if is_longer else new_run}"
        )


def resumed_checkpoint(args: Any) -> Path | None:
    """The file of ``--restore-file``, in ``--save-dir`` unless it is given as a path; None if there is none."""
    path = Path(args.save_dir, RESUMED) if args.restore_file == RESUMED else Path(args.restore_file)
    return path if path.is_file() else None
