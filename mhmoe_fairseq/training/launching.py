"""Processes that would train against each other: noticed before the first update."""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed as dist

from ..common.errors import UserError
from ..common.files import refuse_path_separator
from ..common.locks import hold_folder
from .checks import TrainingFlags

# What tells how many processes were started, who sets it, and what makes fairseq connect them. torch reads the rank
# from torchrun's environment where fairseq names -1.
_LAUNCHERS = {
    "WORLD_SIZE": (
        "torchrun",
        "distributed_training.distributed_world_size={n} distributed_training.distributed_rank=-1 "
        "distributed_training.distributed_init_method=env:// distributed_training.distributed_no_spawn=true "
        "to fairseq-hydra-train, or --distributed-world-size {n} --distributed-rank -1 "
        "--distributed-init-method env:// --distributed-no-spawn to fairseq-train",
    ),
    "SLURM_STEP_NUM_TASKS": ("srun", "--distributed-world-size {n} --distributed-port PORT to fairseq-train"),
}


def require_process_group() -> None:
    """Stop if this process is one of several that fairseq did not connect; to be called before a model is trained.

    Each would train on all the data and overwrite the others' checkpoints, without a word. It happens where fairseq
    does not read the launcher's environment: under ``srun`` without the flags that the message names, and under
    ``torchrun`` with ``fairseq-hydra-train``, which loads this package after it has looked, when
    ``compat.follow_launchers`` comes too late.

    Raises:
        UserError: with the flags that connect the processes.
    """
    if dist.is_available() and dist.is_initialized():
        return
    for variable, (launcher, flags) in _LAUNCHERS.items():
        started = os.environ.get(variable, "1")
        if started.isdecimal() and int(started) > 1:
            raise UserError(
                f"{variable} ({started}): {launcher} started {started} processes, but fairseq has not connected them, "
                "so each would train alone and overwrite the others' checkpoints. "
                f"Add {flags.format(n=started)}. If each is meant to train alone, with a --save-dir of its own, "
                f"unset {variable}"
            )


def hold_save_dir(flags: TrainingFlags) -> None:
    """Keep other trainings out of the checkpoints' folder while this one runs; to be called before a model is trained.

    Two runs would mix their checkpoints without a word, until one fails over a file that the other has renamed. fairseq
    has made the folder by now; where there is none, nothing is trained.

    Raises:
        UserError: if no command could open the checkpoints there, or another training, of this machine or of one that
            shares its files, saves there.
    """
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    folder = Path(flags.save_dir)
    if not flags.no_save:
        refuse_path_separator(folder, "--save-dir")
    if is_first and not flags.no_save and folder.is_dir():
        hold_folder(folder, "--save-dir")
