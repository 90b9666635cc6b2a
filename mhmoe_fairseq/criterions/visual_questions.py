"""Binary cross entropy of every answer to a question about an image, and the VQA soft score."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from fairseq.criterions import FairseqCriterion, register_criterion
from torch import Tensor, nn

from .gate_losses import GateLossConfig, GateLosses
from .row_logs import log_rows, row_log


@register_criterion("mhmoe_vqa", dataclass=GateLossConfig)
class VQACriterion(FairseqCriterion):
    """``loss = binary cross entropy in nats, summed over answers and questions, + questions * (w_b * balance + ...)``.

    That is BEiT-3's ``mean over questions and answers * number of answers``. The auxiliary losses are those of
    ``moe_cross_entropy``. The logs give cross entropy alone, in bits per question (``loss``), and ``vqa_score``, the
    mean soft score of the most probable answers in percent.
    """

    def __init__(
        self, task: Any, moe_gate_loss_wt: float, moe_gate_loss_combine_method: str, mhmoe_z_loss_wt: float
    ) -> None:
        super().__init__(task)
        self.task = task
        self.gate_losses = GateLosses(moe_gate_loss_wt, moe_gate_loss_combine_method, mhmoe_z_loss_wt)

    def forward(self, model: nn.Module, sample: dict[str, Any], reduce: bool = True) -> tuple[Tensor, int, dict]:
        """The loss of one batch.

        Args:
            model: called with the sample's ``net_input`` and the task's ``head_name``.
            sample: its ``targets`` are ``(B, answers)`` soft scores from 0 to 1.
            reduce: sum over the questions.

        Returns:
            the loss, in nats and summed (one value per question, without the auxiliary losses, if not ``reduce``); the
            number of questions; what to log, all of it additive.
        """
        logits, extra = model(**sample["net_input"], head=self.task.head_name)
        scores = sample["targets"].float()
        losses = F.binary_cross_entropy_with_logits(logits.float(), scores, reduction="none").sum(dim=1)
        sample_size = scores.size(0)
        logging_output = {
            "loss": losses.detach().sum(),
            "score": scores.gather(1, logits.argmax(dim=1, keepdim=True)).sum(),
            **row_log(sample, sample_size),
        }
        if not reduce:
            return losses, sample_size, logging_output
        loss, log = self.gate_losses.add_to(losses.sum(), extra, sample_size)
        return loss, sample_size, {**logging_output, **log}

    @staticmethod
    def reduce_metrics(logging_outputs: list[dict[str, Any]]) -> None:
        """Log the mean loss and score."""
        log_rows(logging_outputs, vqa_score="score")

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """True: everything logged is additive, vectors included."""
        return True
