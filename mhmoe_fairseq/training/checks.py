"""Training with stock fairseq: flags and combinations that would go wrong are refused, with what to give."""

from dataclasses import dataclass  # fairseq reads the field types: no postponed annotations here
from typing import Any, Optional

import torch
import torch.distributed as dist
from fairseq.dataclass import FairseqDataclass
from omegaconf import II

from ..common.errors import UserError
from ..common.ranges import check_flags

OPTIMIZER = "mhmoe_adam"
_GPU_BACKENDS = ("pytorch_ddp", "c10d")  # two names of one
_DDP_BACKENDS = ("legacy_ddp", "no_c10d")  # two names of one; it leaves the experts' gradients to us


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


def check_training_numbers(flags: TrainingFlags) -> None:
    """Refuse, before training, a number of fairseq's own flags that would end it later, or spoil it without a word."""
    for group in ("optimization_config", "optimizer_config", "lr_scheduler_config", "criterion_config", "ema_config"):
        check_flags(getattr(flags, group, None))


def refuse_unsafe_flags(flags: TrainingFlags, expert_parallel_size: int) -> None:
    """Stop before training where fairseq would treat sharded experts as if every rank held the same ones.

    Args:
        flags: the task's configuration.
        expert_parallel_size: ranks that share one bank of experts, more than one.

    Raises:
        UserError: naming the flag, its value, the rule and the reason.
    """
    for problem in problems(flags):
        raise UserError(
            f"{problem}. (Experts are spread over {expert_parallel_size} ranks. Where every rank holds them all, with "
            "--mhmoe-expert-parallel-size 1, this is not needed.)"
        )


def problems(flags: TrainingFlags) -> list[str]:
    """Every flag that does not go with experts on several ranks: its name, its value, the rule and the reason."""
    name, backend, zero = optimizer_name(flags), flags.ddp_backend, flags.zero_sharding
    rules = {
        f"--optimizer ({name}) must be {OPTIMIZER}, the same Adam, which averages, clips and saves the experts of all "
        "ranks": name == OPTIMIZER,
        "--fp16-adam-stats must be off: each rank scales its statistics by itself, and a checkpoint has one scale": (
            not getattr(flags.optimizer_config, "fp16_adam_stats", False)
        ),
        f"--ddp-backend ({backend}) must be legacy_ddp: other backends average the gradients of different experts": (
            backend in _DDP_BACKENDS
        ),
        f"--zero-sharding ({zero}) must be none: it gives every rank's parameters to other ranks": zero == "none",
        "--use-bmuf must be off: it averages the parameters of different experts": not flags.use_bmuf,
        f"--model-parallel-size ({flags.model_parallel_size}) must be 1: experts are shared out over all ranks": (
            flags.model_parallel_size == 1
        ),
        "--store-ema must be off: the moving average of rank 0 would be saved with its own experts only": (
            not flags.store_ema
        ),
        "--no-save-optimizer-state must be off: fairseq then does not collect the experts of other ranks either": (
            not flags.no_save_optimizer_state
        ),
        "--fp16 needs --fp16-no-flatten-grads or --memory-efficient-fp16: in one flat tensor experts cannot be told "
        "from the rest": not flattens_gradients(flags),
    }
    return [problem for problem, holds in rules.items() if not holds]


def flattens_gradients(flags: TrainingFlags) -> bool:
    """Whether fairseq makes one flat tensor of all gradients, as ``--fp16`` does unless it is told otherwise."""
    return flags.fp16 and not (flags.memory_efficient_fp16 or flags.fp16_no_flatten_grads)


def refuse_ddp_without_gpus(flags: TrainingFlags) -> None:
    """Refuse fairseq's default backend for ranks on CPUs: it would be given the number of a GPU that there is not."""
    is_alone = not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1
    if is_alone or flags.ddp_backend not in _GPU_BACKENDS:
        return
    if flags.cpu or not torch.cuda.is_available():
        raise UserError(
            f"--ddp-backend ({flags.ddp_backend}) needs a GPU for every rank: on CPUs give --ddp-backend legacy_ddp"
        )


def optimizer_name(flags: TrainingFlags) -> Any:
    """What ``--optimizer`` names."""
    return getattr(flags.optimizer_config, "_name", flags.optimizer_config)
