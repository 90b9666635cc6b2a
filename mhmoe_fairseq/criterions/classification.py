"""Cross entropy over classes plus the MoE layers' balance loss and z-loss: what classification criterions share."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from fairseq.criterions import FairseqCriterion
from torch import Tensor, nn

from ..common.ranges import check_flag
from .gate_losses import GateLosses
from .row_logs import log_rows, row_log


class ClassificationCriterion(FairseqCriterion):
    """``loss = cross entropy in nats, summed over examples, + examples * (w_b * balance + w_z * z)``.

    The auxiliary losses are those of ``moe_cross_entropy``. The logs give cross entropy alone, in bits per example
    (``loss``), and the share of right answers in percent (``accuracy``).

    Args:
        task: with ``head_name``, the head that the model is called with.
        moe_gate_loss_wt, moe_gate_loss_combine_method, mhmoe_z_loss_wt: as in ``GateLossConfig``.
        label_smoothing: share of a target's weight that all classes get alike, in training.

    Raises:
        ValueError: if a weight is negative, or the smoothing none from 0 to 1.
    """

    targets = "targets"
    uses_top5 = False

    def __init__(
        self,
        task: Any,
        moe_gate_loss_wt: float,
        moe_gate_loss_combine_method: str,
        mhmoe_z_loss_wt: float,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(task)
        check_flag("label_smoothing", label_smoothing)
        self.task = task
        self.gate_losses = GateLosses(moe_gate_loss_wt, moe_gate_loss_combine_method, mhmoe_z_loss_wt)
        self.label_smoothing = label_smoothing

    def logits(self, model: nn.Module, sample: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """``(B, classes)`` logits and the model's ``extra``."""
        return model(**sample["net_input"], head=self.task.head_name)

    def forward(self, model: nn.Module, sample: dict[str, Any], reduce: bool = True) -> tuple[Tensor, int, dict]:
        """The loss of one batch.

        Args:
            model: called with the sample's ``net_input`` and the name of the head.
            sample: its targets are ``(B,)`` class ids.
            reduce: sum over the examples.

        Returns:
            the loss, in nats and summed (one value per example, without the auxiliary losses, if not ``reduce``); the
            number of examples; what to log, all of it additive.
        """
        logits, extra = self.logits(model, sample)
        target = sample[self.targets]
        smoothing = self.label_smoothing if model.training else 0.0
        cross_entropy = F.cross_entropy(
            logits.float(), target, reduction="sum" if reduce else "none", label_smoothing=smoothing
        )
        sample_size = target.size(0)
        logging_output = {
            "loss": cross_entropy.detach().sum(),
            "ncorrect": logits.argmax(dim=1).eq(target).sum(),
            **row_log(sample, sample_size),
        }
        if self.uses_top5:
            best = logits.topk(min(5, logits.size(1)), dim=1).indices
            logging_output["ncorrect5"] = best.eq(target[:, None]).sum()
        if not reduce:
            return cross_entropy, sample_size, logging_output
        loss, log = self.gate_losses.add_to(cross_entropy, extra, sample_size)
        return loss, sample_size, {**logging_output, **log}

    @staticmethod
    def reduce_metrics(logging_outputs: list[dict[str, Any]]) -> None:
        """Log the mean loss and accuracies."""
        log_rows(logging_outputs, accuracy="ncorrect", accuracy5="ncorrect5")

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """True: everything logged is additive, vectors included."""
        return True
