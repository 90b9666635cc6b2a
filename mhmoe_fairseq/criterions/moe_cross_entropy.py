"""Cross entropy plus the MoE layers' balance loss and z-loss."""

from dataclasses import dataclass  # fairseq reads the field types: no postponed annotations here
from typing import Any

import torch.nn.functional as F
from fairseq.criterions import register_criterion
from fairseq.models import BaseFairseqModel
from omegaconf import II

from .base import GateLossConfig, Losses, MoECriterion


@dataclass
class MoECrossEntropyConfig(GateLossConfig):
    """Flags of the criterion."""

    sentence_avg: bool = II("optimization.sentence_avg")


@register_criterion("moe_cross_entropy", dataclass=MoECrossEntropyConfig)
class MoECrossEntropyCriterion(MoECriterion):
    """``loss = cross entropy in nats, summed over targets, + sample_size * (w_b * balance + w_z * z)``.

    A dense model has neither ``balance`` nor ``z``, and its loss is plain cross entropy. The logs give cross entropy
    alone, in bits as everywhere in fairseq (``loss``, and ``ppl`` from it).
    """

    nll = "loss"

    def losses(self, model: BaseFairseqModel, sample: dict[str, Any]) -> Losses:
        """Cross entropy of every target, 0 where padded; the loss is divided by their number or the sentences'."""
        target = model.get_targets(sample, None)
        if getattr(model, "takes_targets", False):
            losses, extra = model(**sample["net_input"], targets=target)
        else:  # a model of fairseq's
            logits, extra = model(**sample["net_input"])
            log_probs = model.get_normalized_probs((logits, None), log_probs=True).flatten(0, -2)
            losses = F.nll_loss(log_probs, target.flatten(), ignore_index=self.padding_idx, reduction="none")
        sample_size = target.size(0) if self.cfg.sentence_avg else sample["ntokens"]
        return losses.flatten(), {"nsentences": target.size(0), "sample_size": sample_size}, [extra]
