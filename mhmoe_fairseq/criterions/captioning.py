"""Captioning as BEiT-3 trains it: smoothed cross entropy of masked tokens, plus the balance loss and z-loss."""

import math
from dataclasses import dataclass, field  # fairseq reads the field types: no postponed annotations here
from typing import Any

import torch.nn.functional as F
from fairseq.criterions import register_criterion
from fairseq.models import BaseFairseqModel
from torch import Tensor

from .base import GateLossConfig, Losses, MoECriterion


@dataclass
class CaptioningConfig(GateLossConfig):
    """Flags of the criterion."""

    label_smoothing: float = field(
        default=0.1, metadata={"help": "probability that the targets leave to all other tokens together"}
    )
    drop_worst_ratio: float = field(
        default=0.2, metadata={"help": "share of a batch's tokens, those of the largest loss, that do not count"}
    )
    drop_worst_after: int = field(
        default=12000, metadata={"help": "updates before which all tokens count, as always in validation"}
    )


@register_criterion("mhmoe_captioning", dataclass=CaptioningConfig)
class CaptioningCriterion(MoECriterion):
    """Kullback-Leibler divergence of the model's distribution from the smoothed target, at masked tokens of captions.

    ``loss = sum of the tokens' divergences in nats + tokens * (w_b * balance + w_z * z)``, over the tokens that count:
    from ``--drop-worst-after`` updates on the ``--drop-worst-ratio`` with the largest divergence do not, since their
    captions are often wrong. The smoothed target has 1 less ``--label-smoothing`` at the token and the rest evenly at
    all others.

    Logged: ``loss``, the divergence in bits of tokens that count; of all masked tokens ``nll_loss``, cross entropy
    without smoothing in bits, ``ppl`` from it and ``accuracy`` in percent; and ``cider``, 100 times its mean, if the
    task has decoded captions. The task tells the updates so far as ``num_updates``.
    """

    nll = "nll_loss"
    percentages = {"accuracy": ("ncorrect", "ntokens"), "cider": ("cider_sum", "captions")}

    def losses(self, model: BaseFairseqModel, sample: dict[str, Any]) -> Losses:
        """Return the divergences of the tokens that count, and sums over all masked ones.

        Args:
            model: called with the sample's ``net_input`` and ``attention="caption"``; has ``text_logits``.
            sample: its ``text_targets`` are ``(B, S)``, padding where nothing is predicted.
        """
        features, extra = model(**sample["net_input"], attention="caption")
        masked = sample["text_targets"].ne(self.padding_idx)
        targets = sample["text_targets"][masked]
        logits = model.text_logits(features[:, extra["image_positions"] :][masked]).float()
        sums = {
            "nll_loss": F.cross_entropy(logits.detach(), targets, reduction="sum"),
            "ncorrect": logits.detach().argmax(dim=1).eq(targets).sum(),
            "nsentences": sample["nsentences"],
        }
        divergences = smoothed_divergence(logits, targets, self.cfg.label_smoothing)
        return self._without_worst(divergences, model.training), sums, [extra]

    def _without_worst(self, divergences: Tensor, is_training: bool) -> Tensor:
        ratio, count = self.cfg.drop_worst_ratio, divergences.numel()
        if not is_training or not ratio or self.task.num_updates < self.cfg.drop_worst_after:
            return divergences
        return divergences.topk(min(max(1, int(count * (1 - ratio))), count), largest=False).values


def smoothed_divergence(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Return ``(M,)`` values of ``KL(q || p)`` in nats; q is ``1 - smoothing`` at the target, even elsewhere.

    Args:
        logits: ``(M, V)``, of p.
        targets: ``(M,)`` ids.
    """
    others = logits.size(-1) - 1
    share = smoothing / others
    # torch's own smoothing gives the target a share of the rest, too.
    cross_entropy = F.cross_entropy(logits, targets, reduction="none", label_smoothing=share * (others + 1))
    return cross_entropy + sum(count * q * math.log(q) for count, q in ((1, 1 - smoothing), (others, share)) if q)
