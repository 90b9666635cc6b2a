"""Cross entropy plus the MoE layers' balance loss and z-loss."""

import math
from dataclasses import dataclass  # fairseq reads the field types: no postponed annotations here
from typing import Any

import torch.nn.functional as F
from fairseq import utils
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.logging import metrics
from omegaconf import II
from torch import Tensor, nn

from .gate_losses import GateLossConfig, GateLosses, log_gate_losses


@dataclass
class MoECrossEntropyConfig(GateLossConfig):
    """Flags of the criterion."""

    sentence_avg: bool = II("optimization.sentence_avg")


@register_criterion("moe_cross_entropy", dataclass=MoECrossEntropyConfig)
class MoECrossEntropyCriterion(FairseqCriterion):
    """``loss = cross entropy in nats, summed over targets, + sample_size * (w_b * balance + w_z * z)``.

    ``balance`` and ``z`` are the layers' values combined by sum or average. A dense model has neither, and its loss is
    plain cross entropy. The logs give cross entropy alone, in bits as everywhere in fairseq (``loss``, and ``ppl``
    from it), so that models with and without MoE layers, and any weights, compare.

    Attributes:
        keeps_targets_apart: with ``reduce=False`` it returns every target's loss and logs all the same.
    """

    keeps_targets_apart = True

    def __init__(
        self,
        task: Any,
        moe_gate_loss_wt: float,
        moe_gate_loss_combine_method: str,
        mhmoe_z_loss_wt: float,
        sentence_avg: bool,
    ) -> None:
        super().__init__(task)
        self.gate_losses = GateLosses(moe_gate_loss_wt, moe_gate_loss_combine_method, mhmoe_z_loss_wt)
        self.sentence_avg = sentence_avg

    def forward(self, model: nn.Module, sample: dict[str, Any], reduce: bool = True) -> tuple[Tensor, int, dict]:
        """The loss of one batch.

        Returns:
            the loss, in nats and summed (one value per target, without the auxiliary losses, if not ``reduce``); the
            number of targets or sentences that it is later divided by; what to log, all of it additive.
        """
        logits, extra = model(**sample["net_input"])
        cross_entropy = self._cross_entropy(model, logits, sample, reduce)
        sample_size = sample["target"].size(0) if self.sentence_avg else sample["ntokens"]
        logging_output = {
            "loss": cross_entropy.detach().sum(),
            "ntokens": sample["ntokens"],
            "nsentences": sample["target"].size(0),
            "sample_size": sample_size,
        }
        loss, log = self.gate_losses.add_to(cross_entropy, extra, sample_size)
        return loss if reduce else cross_entropy, sample_size, {**logging_output, **log}

    def _cross_entropy(self, model: nn.Module, logits: Tensor, sample: dict[str, Any], reduce: bool) -> Tensor:
        log_probs = model.get_normalized_probs((logits, None), log_probs=True)
        target = model.get_targets(sample, None)
        return F.nll_loss(
            log_probs.reshape(-1, log_probs.size(-1)),
            target.reshape(-1),
            ignore_index=self.padding_idx,
            reduction="sum" if reduce else "none",
        )

    @staticmethod
    def reduce_metrics(logging_outputs: list[dict[str, Any]]) -> None:
        """Log sums over the batches; what is derived from routing is derived from the whole set's counts."""
        total = {key: sum(log.get(key, 0) for log in logging_outputs) for key in ("loss", "ntokens", "sample_size")}
        sample_size, ntokens = total["sample_size"], total["ntokens"]
        metrics.log_scalar("loss", total["loss"] / sample_size / math.log(2), sample_size, round=3)
        per_token = "loss"
        if sample_size != ntokens:
            per_token = "nll_loss"
            metrics.log_scalar(per_token, total["loss"] / ntokens / math.log(2), ntokens, round=3)
        metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters[per_token].avg))
        log_gate_losses(logging_outputs, sample_size)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """True: everything logged is additive, vectors included."""
        return True
