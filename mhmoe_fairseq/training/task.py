"""What every task of this package does about several processes and about failures."""

import logging
import sys
from typing import Any

import torch
from fairseq.criterions import FairseqCriterion
from fairseq.data import FairseqDataset
from fairseq.distributed import utils as distributed_utils
from fairseq.models import BaseFairseqModel
from fairseq.tasks import FairseqTask
from torch import Tensor, nn

from ..common.ranges import check_flags
from ..compat import refuse_tpu
from ..moe import RoutingStats
from ..moe.layer import taken_for_padding
from ..parallel import sharded_experts
from .amp import undo_one_unscaling
from .batches import ResumableEpochBatchIterator, is_filler, without_metrics
from .checks import check_training_numbers, hold_save_dir, refuse_ddp_without_gpus, require_process_group
from .expert_state import prepare_sharded_model
from .failures import guard_ranks, no_lone_recovery
from .layer_updates import LayerUpdates
from .load_log import LoadLog
from .nonfinite import latest_routing, report_nonfinite
from .optimizer import scale_by_name
from .peak_memory import log_peak_memory

logger = logging.getLogger(__name__)


class ParallelTask(FairseqTask):
    """Stands in front of fairseq's task, whose ``args`` are ``TrainingFlags``, among a task's bases.

    In training the model's experts are shared out over the processes, which together compute what one would, also where
    their number does not divide that of the batches; and a run can be resumed on any number of them. Processes that
    nobody connected do not start training, no rank waits for a lost one, and a loss or gradient that is not finite is
    reported with the routing of every layer.

    Attributes:
        is_training: whether the model that is or was built last is for training, and may spread its experts.
        has_spread_experts: whether that model's experts are spread over the ranks.
        num_updates: the training's updates so far; criterions read it.
    """

    args: Any
    is_training = False
    has_spread_experts = False
    num_updates = 0
    _has_experts = False
    _layer_updates = LayerUpdates(nn.Module())
    _routing: dict[nn.Module, RoutingStats] = {}
    _has_reported = False
    _load_log: LoadLog | None = None

    @classmethod
    def setup_task(cls, args: Any, **kwargs: Any) -> "ParallelTask":
        """Check the task's flags, and load what it needs before a model is built; an error names the flag or file."""
        cls.check_args(args)
        return super().setup_task(args)  # without fairseq's from_checkpoint, which is nothing to a task

    @classmethod
    def check_args(cls, args: Any) -> None:
        """Refuse flags before anything is loaded, with a ``UserError``; a task adds rules of its own."""
        refuse_tpu(args.tpu)
        check_flags(args)

    def build_model(self, args: Any, from_checkpoint: bool = False) -> BaseFairseqModel:
        """Build the model: for training with its experts shared out over the ranks, from a checkpoint with all.

        Raises:
            UserError: naming the flag, its value and the rule; because another run is saving to the same folder; or
                for processes that train alone without meaning to.
        """
        self.is_training = not from_checkpoint
        if self.is_training:
            check_training_numbers(self.args)
            refuse_ddp_without_gpus(self.args)
            hold_save_dir(self.args)
            require_process_group()
        model = super().build_model(args, from_checkpoint)
        self._routing = latest_routing(model)
        prepare_sharded_model(model, self.args)
        if self.is_training:
            scale_by_name(model, self.args)
            shards = sharded_experts(model)
            self.has_spread_experts = bool(shards)
            groups = {group for shard in shards for group in (shard.groups.experts, shard.groups.replicas)}
            guard_ranks((groups | {distributed_utils.get_global_group()}) - {None})
            self._layer_updates = LayerUpdates(model)
            self._load_log = LoadLog(model, self.args)
        self._has_experts = any(getattr(module, "is_moe_layer", False) for module in model.modules())
        if any(getattr(module, "drops_tokens", False) for module in model.modules()):
            logger.warning(
                "--mhmoe-routing: which tokens an expert takes depends on the other rows of the batch, and so do "
                "loss and perplexity: compare figures of one --batch-size only (lm-eval, xnli and probe score row by "
                "row)"
            )
        return model

    def build_criterion(self, *args: Any, **kwargs: Any) -> FairseqCriterion:
        """Return fairseq's criterion; one that leaves out the balance loss of a model with experts is told of."""
        criterion = super().build_criterion(*args, **kwargs)
        if self.is_training and self._has_experts and not hasattr(criterion, "add_gate_losses"):
            logger.warning(
                f"--criterion ({type(criterion).__name__}) leaves out the MoE layers' balance loss, so that few "
                "experts may get most tokens: give --criterion moe_cross_entropy (for images or classes the one that "
                "is named as the task)"
            )
        return criterion

    def get_batch_iterator(self, dataset: FairseqDataset, *args: Any, epoch: int = 1, **kwargs: Any) -> Any:
        """Return fairseq's iterator, resumable in any epoch and on any number of ranks; training has fillers.

        fairseq-fixed 0.12.3.1 forms the batches by the epoch in which the iterator is made, and a run that goes on for
        several epochs keeps those of its first. A resumed run must not form others. A dataset that has other samples
        in every epoch gets an iterator for each.
        """
        formed_in = 1 if self.can_reuse_epoch_itr(dataset) else epoch
        iterator = super().get_batch_iterator(dataset, *args, epoch=formed_in, **kwargs)
        if not isinstance(iterator, ResumableEpochBatchIterator):  # else it has served an epoch before
            dataset.set_epoch(epoch)
            iterator.epoch = max(epoch, 1)
        return ResumableEpochBatchIterator.of(iterator, has_fillers=self.is_training)

    def train_step(
        self,
        sample: dict,
        model: nn.Module,
        criterion: Any,
        optimizer: Any,
        update_num: int,
        ignore_grad: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Any, dict]:
        """fairseq's forward and backward pass of one batch."""
        self.num_updates = update_num
        self._layer_updates.begin_batch()
        filler = is_filler(sample)
        with taken_for_padding(model, filler), no_lone_recovery(self.has_spread_experts):
            outcome = super().train_step(
                sample, model, criterion, optimizer, update_num, ignore_grad=ignore_grad or filler, **kwargs
            )
        if isinstance(sys.exc_info()[1], FloatingPointError):  # fairseq looks where in the update it came from
            report_nonfinite(model, outcome[0], "the update whose gradient is not finite", self._routing)
        outcome = outcome if self._load_log is None else self._load_log.add_to(outcome)
        return without_metrics(outcome) if filler else outcome

    def reduce_metrics(self, logging_outputs: list[dict[str, Any]], criterion: Any) -> None:
        """fairseq's hook for the logs of one update, or of one batch of a validation, of all ranks."""
        super().reduce_metrics(logging_outputs, criterion)
        log_peak_memory()
        if self._load_log is not None:
            self._load_log.log(logging_outputs, self.num_updates + 1)

    def optimizer_step(self, optimizer: Any, model: nn.Module, update_num: int) -> None:
        """fairseq's hook for an update of the parameters, after which modules of its layers may act."""
        with self._layer_updates.after(optimizer):
            undo_one_unscaling(optimizer)
            super().optimizer_step(optimizer, model, update_num)

    def begin_valid_epoch(self, epoch: int, model: nn.Module) -> None:
        """fairseq's hook before a validation."""
        super().begin_valid_epoch(epoch, model)
        self._has_reported = False

    def valid_step(self, sample: dict, model: nn.Module, criterion: Any) -> tuple[Tensor, Any, dict]:
        """fairseq's hook for a batch of a validation, of which the first whose loss is not finite is reported."""
        filler = is_filler(sample)
        model.eval()
        with torch.no_grad(), taken_for_padding(model, filler), no_lone_recovery(self.has_spread_experts):
            outcome = self.evaluate_batch(sample, model, criterion)
        if not self._has_reported and not torch.isfinite(outcome[0]).all():
            self._has_reported = True
            report_nonfinite(model, outcome[0], "validation", self._routing)
        return without_metrics(outcome) if filler else outcome

    def evaluate_batch(self, sample: dict, model: nn.Module, criterion: Any) -> tuple[Tensor, Any, dict]:
        """Return loss, sample size and what to log of one batch of a validation, fillers among them.

        A task of one's own measures more here; gradients are off and the model is in evaluation.
        """
        return criterion(model, sample)
