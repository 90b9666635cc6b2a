"""What would go wrong in a training with stock fairseq is refused before the first update, with what to give instead.

That is flags and combinations of them, processes that nobody connected, and a folder that another training writes to.
"""

import os
from dataclasses import dataclass, field  # fairseq reads the field types: no postponed annotations here
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist
from fairseq.dataclass import FairseqDataclass
from omegaconf import II

from ..common.errors import UserError
from ..common.files import refuse_path_separator
from ..common.locks import hold_folder
from ..common.ranges import check_flags

OPTIMIZER = "mhmoe_adam"
_GPU_BACKENDS = ("pytorch_ddp", "c10d")  # two names of one
_DDP_BACKENDS = ("legacy_ddp", "no_c10d")  # two names of one; it leaves the experts' gradients to us
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


@dataclass
class TrainingFlags(FairseqDataclass):
    """fairseq's flags of other groups that a training of ours depends on; a task sees only its own group."""

    optimizer_config: Any = II("optimizer")
    cpu: bool = II("common.cpu")
    optimization_config: Any = II("optimization")
    lr_scheduler_config: Any = II("lr_scheduler")
    criterion_config: Any = II("criterion")
    ema_config: Any = II("ema")
    ddp_backend: str = II("distributed_training.ddp_backend")
    zero_sharding: str = II("distributed_training.zero_sharding")
    use_bmuf: bool = II("optimization.use_bmuf")
    model_parallel_size: int = II("common.model_parallel_size")
    store_ema: bool = II("ema.store_ema")
    save_dir: str = II("checkpoint.save_dir")
    no_save: bool = II("checkpoint.no_save")
    no_save_optimizer_state: bool = II("checkpoint.no_save_optimizer_state")
    fp16: bool = II("common.fp16")
    memory_efficient_fp16: bool = II("common.memory_efficient_fp16")
    fp16_no_flatten_grads: bool = II("common.fp16_no_flatten_grads")
    seed: int = II("common.seed")
    tpu: bool = II("common.tpu")
    finetune_from_model: Optional[str] = II("checkpoint.finetune_from_model")
    restore_file: str = II("checkpoint.restore_file")
    reset_optimizer: bool = II("checkpoint.reset_optimizer")
    log_interval: int = II("common.log_interval")
    tensorboard_logdir: Optional[str] = II("common.tensorboard_logdir")
    mhmoe_load_log: Optional[str] = field(
        default=None,
        metadata={
            "help": "write how many sub-tokens of each layer and head went to each expert there, every --log-interval "
            "updates: .jsonl or .csv; with --tensorboard-logdir as histograms, too (docs/tracking.md)"
        },
    )


def check_training_numbers(flags: TrainingFlags) -> None:
    """Refuse a number of fairseq's own flags that would end the training later, or spoil it without a word."""
    for group in ("optimization_config", "optimizer_config", "lr_scheduler_config", "criterion_config", "ema_config"):
        check_flags(getattr(flags, group, None))


def problems(flags: TrainingFlags) -> list[str]:
    """Return the flags under which fairseq would treat sharded experts as if every rank held the same ones.

    Each with its name, value, rule and reason.
    """
    name, adam_stats = optimizer_name(flags), getattr(flags.optimizer_config, "fp16_adam_stats", False)
    allowed = (
        ("--optimizer", name, (OPTIMIZER,), ", the same Adam, which averages, clips and saves all ranks' experts"),
        ("--ddp-backend", flags.ddp_backend, _DDP_BACKENDS, ": others average the gradients of different experts"),
        ("--zero-sharding", flags.zero_sharding, ("none",), ": it gives every rank's parameters to other ranks"),
        ("--model-parallel-size", flags.model_parallel_size, (1,), ": experts are shared out over all ranks"),
    )
    off = (
        ("--fp16-adam-stats", adam_stats, "each rank scales its statistics by itself, and a checkpoint has one scale"),
        ("--use-bmuf", flags.use_bmuf, "it averages the parameters of different experts"),
        ("--store-ema", flags.store_ema, "the moving average of rank 0 would be saved with its own experts only"),
        ("--no-save-optimizer-state", flags.no_save_optimizer_state, "fairseq then collects no other ranks' experts"),
    )
    found = [f"{flag} ({value}) must be {ok[0]}{reason}" for flag, value, ok, reason in allowed if value not in ok]
    found += [f"{flag} must be off: {reason}" for flag, is_on, reason in off if is_on]
    if flattens_gradients(flags):
        rule = "needs --fp16-no-flatten-grads or --memory-efficient-fp16"
        found.append(f"--fp16 {rule}: in one flat tensor experts cannot be told from the rest")
    return found


def flattens_gradients(flags: TrainingFlags) -> bool:
    """Return whether fairseq makes one flat tensor of all gradients, as ``--fp16`` does unless it is told otherwise."""
    return flags.fp16 and not (flags.memory_efficient_fp16 or flags.fp16_no_flatten_grads)


def refuse_ddp_without_gpus(flags: TrainingFlags) -> None:
    """Refuse fairseq's default backend for ranks on CPUs: it would be given the number of a GPU that there is not."""
    is_alone = not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1
    needs_gpus = not is_alone and flags.ddp_backend in _GPU_BACKENDS
    if needs_gpus and (flags.cpu or not torch.cuda.is_available()):
        raise UserError(
            f"--ddp-backend ({flags.ddp_backend}) needs a GPU for every rank: on CPUs give --ddp-backend legacy_ddp"
        )


def optimizer_name(flags: TrainingFlags) -> Any:
    """Return what ``--optimizer`` names."""
    return getattr(flags.optimizer_config, "_name", flags.optimizer_config)


def require_process_group() -> None:
    """Stop, with a ``UserError`` that names the flags, if this process is one of several that fairseq did not connect.

    Each would train on all the data and overwrite the others' checkpoints, without a word. It happens where fairseq
    does not read the launcher's environment: under ``srun`` without the flags that the message names, and under
    ``torchrun`` with ``fairseq-hydra-train``, which loads this package after it has looked, when
    ``compat.follow_launchers`` comes too late.
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
    """Keep other trainings out of the checkpoints' folder while this one runs.

    Two runs would mix their checkpoints without a word, until one fails over a file that the other has renamed. fairseq
    has made the folder by now; where there is none, nothing is trained. A ``UserError`` says that no command could open
    the checkpoints there, or that another training, of this machine or of one that shares its files, saves there.
    """
    folder = Path(flags.save_dir)
    if flags.no_save:
        return
    refuse_path_separator(folder, "--save-dir")
    if folder.is_dir() and (not dist.is_initialized() or dist.get_rank() == 0):
        hold_folder(folder, "--save-dir")
