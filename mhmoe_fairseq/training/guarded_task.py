"""What every task of this package does about failures."""

from __future__ import annotations

from typing import Any

import torch
from fairseq.distributed import utils as distributed_utils
from fairseq.models import BaseFairseqModel
from fairseq.tasks import FairseqTask
from torch import Tensor, nn

from ..parallel import sharded_experts
from .failures import guard_ranks, no_lone_recovery
from .launching import require_process_group
from .nonfinite import is_looking_for_nan, report_nonfinite


class GuardedTask(FairseqTask):
    """Stands in front of fairseq's task among a task's bases.

    Processes that nobody connected do not start training, no rank waits for a lost one, and a loss or gradient that
    is not finite is reported with the routing of every layer.
    """

    _spreads_experts = False
    _has_reported = False

    def build_model(self, args: Any, from_checkpoint: bool = False) -> BaseFairseqModel:
        """Build the model; for training, guard the ranks.

        Raises:
            UserError: for processes that train alone without meaning to.
        """
        if not from_checkpoint:
            require_process_group()
        model = super().build_model(args, from_checkpoint)
        if not from_checkpoint:
            shards = sharded_experts(model)
            self._spreads_experts = bool(shards)
            own = {group for shard in shards for group in (shard.groups.experts, shard.groups.replicas)}
            everyone = distributed_utils.get_global_group()
            guard_ranks([*own, *([] if everyone is None else [everyone])])
        return model

    def train_step(self, sample: dict, model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Any, dict]:
        """fairseq's forward and backward pass of one batch."""
        with no_lone_recovery(self._spreads_experts):
            outcome = super().train_step(sample, model, *args, **kwargs)
        if is_looking_for_nan():
            report_nonfinite(model, outcome[0], "the update whose gradient is not finite")
        return outcome

    def begin_valid_epoch(self, epoch: int, model: nn.Module) -> None:
        """fairseq's hook before a validation."""
        super().begin_valid_epoch(epoch, model)
        self._has_reported = False

    def valid_step(self, sample: dict, model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Any, dict]:
        """One batch of a validation; the first whose loss is not finite is reported."""
        outcome = super().valid_step(sample, model, *args, **kwargs)
        if not self._has_reported and not torch.isfinite(outcome[0]).all():
            self._has_reported = True
            report_nonfinite(model, outcome[0], "validation")
        return outcome
