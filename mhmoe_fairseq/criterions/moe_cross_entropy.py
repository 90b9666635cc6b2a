"""Cross entropy plus the MoE layers' balance loss and z-loss."""

from dataclasses import dataclass  # fairseq reads the field types: no postponed annotations here
from typing import Any

import torch.nn.functional as F
from fairseq.criterions import register_criterion
from omegaconf import II
from torch import Tensor, nn

from .base import MoECriterion, Outcome, log_bits, log_perplexity, total
from .gate_losses import GateLossConfig, log_gate_losses


@dataclass
class MoECrossEntropyConfig(GateLossConfig):
    """Flags of the criterion."""

    sentence_avg: bool = II("optimization.sentence_avg")


@register_criterion("moe_cross_entropy", dataclass=MoECrossEntropyConfig)
class MoECrossEntropyCriterion(MoECriterion):
    """``loss = cross entropy in nats, summed over targets, + sample_size * (w_b * balance + w_z * z)``.

    ``balance`` and ``z`` are the layers' values combined by sum or average. A dense model has neither, and its loss is
    plain cross entropy. The logs give cross entropy alone, in bits as everywhere in fairseq (``loss``, and ``ppl``
    from it), so that models with and without MoE layers, and any weights, compare.
    """

    def forward(self, model: nn.Module, sample: dict[str, Any], reduce: bool = True) -> Outcome:
        """The loss of one batch.

        Returns:
            the loss, in nats and summed (one value per target, without the auxiliary losses, if not ``reduce``); the
            number of targets or sentences that it is later divided by; what to log, all of it additive.
        """
        logits, extra = model(**sample["net_input"])
        cross_entropy = self._cross_entropy(model, logits, sample, reduce)
        sample_size = sample["target"].size(0) if self.cfg.sentence_avg else sample["ntokens"]
        logging_output = {
            "loss": cross_entropy.detach().sum(),
            "ntokens": sample["ntokens"],
            "nsentences": sample["target"].size(0),
            "sample_size": sample_size,
        }
        loss, log = self.gate_losses.add_to(cross_entropy, [extra], sample_size)
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
        sample_size, ntokens, nats = (total(logging_outputs, key) for key in ("sample_size", "ntokens", "loss"))
        log_bits("loss", nats, sample_size)
        if sample_size != ntokens:
            log_bits("nll_loss", nats, ntokens)
        log_perplexity("ppl", of="loss" if sample_size == ntokens else "nll_loss")
        log_gate_losses(logging_outputs, sample_size)
