"""BitNet's learning rate and weight decay in two halves of a training: ``--lr-scheduler mhmoe_two_stage``.

Ternary weights want a high learning rate while they still change their values, and no weight decay when they should
come to rest (BitNet b1.58's training tips; https://github.com/microsoft/unilm, bitnet): the loss falls once more where
the rate drops.
"""

from dataclasses import dataclass, field  # fairseq reads the field types: no postponed annotations here
from typing import List, Optional

from fairseq.dataclass import FairseqDataclass
from fairseq.optim import FairseqOptimizer
from fairseq.optim.lr_scheduler import FairseqLRScheduler, register_lr_scheduler
from omegaconf import II

from ..common.errors import UserError

TWO_STAGE = "mhmoe_two_stage"


@dataclass
class TwoStageConfig(FairseqDataclass):
    """Flags of the two halves; --lr and --weight-decay are the first's."""

    warmup_updates: int = field(default=0, metadata={"help": "the learning rate rises from 0 during so many updates"})
    second_lr: Optional[float] = field(
        default=None,
        metadata={"help": "where the second half's line begins, were it drawn from update 0 (default: 2/3 of --lr)"},
    )
    second_weight_decay: float = field(default=0.0, metadata={"help": "weight decay of the second half"})
    max_update: int = II("optimization.max_update")
    lr: List[float] = II("optimization.lr")


@register_lr_scheduler(TWO_STAGE, dataclass=TwoStageConfig)
class TwoStageSchedule(FairseqLRScheduler):
    """Two lines that end in 0 at T, ``--max-update``: ``p1 (1 - t / T)`` for t < T / 2, ``p2 (1 - t / T)`` from there.

    Within the warm-up of W updates they are multiplied by t / W. All follows from the number of updates, so that a run
    goes on as if it had not stopped.

    Raises:
        UserError: without ``--max-update``, or for several learning rates.
    """

    def __init__(self, cfg: TwoStageConfig, optimizer: FairseqOptimizer) -> None:
        super().__init__(cfg, optimizer)
        if not cfg.max_update > 0:
            raise UserError(f"--max-update ({cfg.max_update}) must be given with --lr-scheduler {TWO_STAGE}")
        if len(cfg.lr) != 1:
            raise UserError(f"--lr ({', '.join(map(str, cfg.lr))}) must be one with --lr-scheduler {TWO_STAGE}")
        self._decays = [group["weight_decay"] for group in optimizer.param_groups]
        self._second_lr = 2 / 3 * cfg.lr[0] if cfg.second_lr is None else cfg.second_lr
        self.step_update(0)

    def step_update(self, num_updates: int) -> float:
        """Set learning rate and weight decay after so many updates, and return the former."""
        updates, warmup = self.cfg.max_update, self.cfg.warmup_updates
        is_second = 2 * num_updates >= updates
        lr = self._second_lr if is_second else self.cfg.lr[0]
        rising = min(num_updates / warmup, 1.0) if warmup else 1.0
        self.optimizer.set_lr(lr * rising * max(1 - num_updates / updates, 0.0))
        for group, decay in zip(self.optimizer.param_groups, self._decays):
            group["weight_decay"] = self.cfg.second_weight_decay if is_second else decay
        return self.optimizer.get_lr()
