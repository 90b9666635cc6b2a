"""What every task of this package does about several processes."""

from __future__ import annotations

import logging
from typing import Any

from fairseq.criterions import FairseqCriterion
from fairseq.data import FairseqDataset
from fairseq.models import BaseFairseqModel
from torch import Tensor, nn

from ..moe.uncounted import taken_for_padding
from .checks import check_training_numbers, refuse_ddp_without_gpus
from .expert_state import prepare_sharded_model
from .fillers import is_filler, without_figures
from .guarded_task import GuardedTask
from .launching import hold_save_dir
from .resuming import ResumableEpochBatchIterator

logger = logging.getLogger(__name__)


class ParallelTask(GuardedTask):
    """Stands in front of fairseq's task, whose ``args`` are ``TrainingFlags``, among a task's bases.

    In training the model's experts are shared out over the processes, which together compute what one would, also where
    their number does not divide that of the batches; and a run can be resumed on any number of them.

    Attributes:
        spreads_experts: whether the model that is being built shares its experts out over the ranks: in training only.
    """

    args: Any
    spreads_experts = False
    _is_training = False
    _has_experts = False

    def build_model(self, args: Any, from_checkpoint: bool = False) -> BaseFairseqModel:
        """Build the model: for training with its experts shared out over the ranks, from a checkpoint with all.

        Raises:
            ValueError: naming the flag, its value and the rule; or because another run is saving to the same folder.
        """
        self.spreads_experts = self._is_training = not from_checkpoint
        if not from_checkpoint:
            check_training_numbers(self.args)
            refuse_ddp_without_gpus(self.args)
            hold_save_dir(self.args)
        model = super().build_model(args, from_checkpoint)
        prepare_sharded_model(model, self.args)
        self._has_experts = any(getattr(module, "is_moe_layer", False) for module in model.modules())
        if any(getattr(module, "drops_tokens", False) for module in model.modules()):
            logger.warning(
                "--mhmoe-routing: which tokens an expert refuses depends on the other rows of the batch, and so do "
                "loss and perplexity: compare figures of one --batch-size only (lm-eval, xnli and probe score row by "
                "row)"
            )
        return model

    def build_criterion(self, *args: Any, **kwargs: Any) -> FairseqCriterion:
        """fairseq's criterion; one that leaves out the balance loss of a model with experts is told of."""
        criterion = super().build_criterion(*args, **kwargs)
        if self._is_training and self._has_experts and not hasattr(criterion, "gate_losses"):
            logger.warning(
                f"--criterion ({type(criterion).__name__}) leaves out the MoE layers' balance loss, so that few "
                "experts may get most tokens: give --criterion moe_cross_entropy (for images or classes the one that "
                "is named as the task)"
            )
        return criterion

    def get_batch_iterator(self, dataset: FairseqDataset, *args: Any, epoch: int = 1, **kwargs: Any) -> Any:
        """fairseq's ``EpochBatchIterator``, resumable in any epoch and on any number of ranks; training has fillers.

        fairseq-fixed 0.12.3.1 forms the batches by the epoch in which the iterator is made, and a run that goes on for
        several epochs keeps those of its first. A resumed run must not form others. A dataset that has other samples
        in every epoch gets an iterator for each.
        """
        formed_in = 1 if self.can_reuse_epoch_itr(dataset) else epoch
        iterator = super().get_batch_iterator(dataset, *args, epoch=formed_in, **kwargs)
        if not isinstance(iterator, ResumableEpochBatchIterator):  # else it has served an epoch before
            dataset.set_epoch(epoch)
            iterator.epoch = max(epoch, 1)
        return ResumableEpochBatchIterator.of(iterator, has_fillers=self._is_training)

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
        filler = is_filler(sample)
        with taken_for_padding(model, filler):
            outcome = super().train_step(
                sample, model, criterion, optimizer, update_num, ignore_grad=ignore_grad or filler, **kwargs
            )
        return without_figures(outcome) if filler else outcome

    def valid_step(self, sample: dict, model: nn.Module, criterion: Any, **kwargs: Any) -> tuple[Tensor, Any, dict]:
        """fairseq's hook for a batch of a validation; what a task does with one is in ``evaluate_batch``."""
        filler = is_filler(sample)
        with taken_for_padding(model, filler):
            outcome = self.evaluate_batch(sample, model, criterion, **kwargs)
        return without_figures(outcome) if filler else outcome

    def evaluate_batch(self, sample: dict, model: nn.Module, criterion: Any, **kwargs: Any) -> tuple[Tensor, Any, dict]:
        """Loss, sample size and what to log of one batch of a validation, fillers among them."""
        return super().valid_step(sample, model, criterion, **kwargs)
