"""Cross entropy over classes plus the MoE layers' balance loss and z-loss."""

import math
from dataclasses import dataclass  # fairseq reads the field types: no postponed annotations here
from typing import Any

import torch.nn.functional as F
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.logging import metrics
from omegaconf import II
from torch import Tensor, nn

from .gate_losses import GateLossConfig, GateLosses, log_gate_losses


@dataclass
class SentenceClassificationConfig(GateLossConfig):
    """Flags of the criterion."""

    classification_head_name: str = II("task.classification_head_name")


@register_criterion("mhmoe_sentence_classification", dataclass=SentenceClassificationConfig)
class SentenceClassificationCriterion(FairseqCriterion):
    """``loss = cross entropy in nats, summed over examples, + examples * (w_b * balance + w_z * z)``.

    The auxiliary losses are those of ``moe_cross_entropy``. The logs give cross entropy alone, in bits per example
    (``loss``), and the share of right answers in percent (``accuracy``).
    """

    def __init__(
        self,
        task: Any,
        moe_gate_loss_wt: float,
        moe_gate_loss_combine_method: str,
        mhmoe_z_loss_wt: float,
        classification_head_name: str,
    ) -> None:
        super().__init__(task)
        self.gate_losses = GateLosses(moe_gate_loss_wt, moe_gate_loss_combine_method, mhmoe_z_loss_wt)
        self.head_name = classification_head_name

    def forward(self, model: nn.Module, sample: dict[str, Any], reduce: bool = True) -> tuple[Tensor, int, dict]:
        """The loss of one batch.

        Args:
            model: called with the sample's ``net_input`` and ``classification_head_name``; returns ``(B, classes)``
                logits and the decoder's ``extra``.
            sample: its ``target`` is ``(B,)`` class ids.
            reduce: sum over the examples.

        Returns:
            the loss, in nats and summed (one value per example, without the auxiliary losses, if not ``reduce``); the
            number of examples; what to log, all of it additive.
        """
        logits, extra = model(**sample["net_input"], classification_head_name=self.head_name)
        target = sample["target"]
        cross_entropy = F.cross_entropy(logits.float(), target, reduction="sum" if reduce else "none")
        sample_size = target.size(0)
        logging_output = {
            "loss": cross_entropy.detach().sum(),
            "ncorrect": logits.argmax(dim=1).eq(target).sum(),
            "ntokens": sample["ntokens"],
            "nsentences": sample_size,
            "sample_size": sample_size,
        }
        if not reduce:
            return cross_entropy, sample_size, logging_output
        loss, log = self.gate_losses.add_to(cross_entropy, extra, sample_size)
        return loss, sample_size, {**logging_output, **log}

    @staticmethod
    def reduce_metrics(logging_outputs: list[dict[str, Any]]) -> None:
        """Log sums over the batches, so that a validation set's figures are exact."""
        total = {key: sum(log.get(key, 0) for log in logging_outputs) for key in ("loss", "ncorrect", "sample_size")}
        size = total["sample_size"]
        metrics.log_scalar("loss", total["loss"] / size / math.log(2), size, round=3)
        metrics.log_scalar("accuracy", 100.0 * total["ncorrect"] / size, size, round=2)
        log_gate_losses(logging_outputs, size)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """True: everything logged is additive, vectors included."""
        return True
