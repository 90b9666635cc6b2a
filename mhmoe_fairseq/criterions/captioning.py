"""Captioning as BEiT-3 trains it: smoothed cross entropy of masked tokens, plus the balance loss and z-loss."""

import math
from dataclasses import dataclass, field  # fairseq reads the field types: no postponed annotations here
from typing import Any

import torch.nn.functional as F
from fairseq.criterions import register_criterion
from fairseq.logging import metrics
from torch import Tensor, nn

from .base import MoECriterion, Outcome, log_bits, log_perplexity, total
from .gate_losses import GateLossConfig, log_gate_losses


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

    def forward(self, model: nn.Module, sample: dict[str, Any], reduce: bool = True) -> Outcome:
        """The loss of one batch.

        Args:
            model: called with the sample's ``net_input`` and ``attention="caption"``; has ``text_logits``.
            sample: its ``text_targets`` are ``(B, S)``, padding where nothing is predicted.
            reduce: there is one loss for the batch either way.

        Returns:
            the loss, in nats and summed over tokens that count; their number; what to log, all of it additive.
        """
        features, extra = model(**sample["net_input"], attention="caption")
        masked = sample["text_targets"].ne(self.padding_idx)
        targets = sample["text_targets"][masked]
        logits = model.text_logits(features[:, extra["image_positions"] :][masked]).float()
        divergences = smoothed_divergence(logits, targets, self.cfg.label_smoothing)
        kept = self._without_worst(divergences, model.training)
        sample_size = kept.numel()
        logging_output = {
            "loss": kept.detach().sum(),
            "nll_loss": F.cross_entropy(logits.detach(), targets, reduction="sum"),
            "ncorrect": logits.detach().argmax(dim=1).eq(targets).sum(),
            "ntokens": targets.numel(),
            "nsentences": sample["nsentences"],
            "sample_size": sample_size,
        }
        loss, log = self.gate_losses.add_to(kept.sum(), [extra], sample_size)
        return loss, sample_size, {**logging_output, **log}

    def _without_worst(self, divergences: Tensor, is_training: bool) -> Tensor:
        ratio = self.cfg.drop_worst_ratio
        if not is_training or not ratio or self.task.num_updates < self.cfg.drop_worst_after:
            return divergences
        keep = max(1, int(divergences.numel() * (1 - ratio)))
        return divergences.topk(min(keep, divergences.numel()), largest=False).values

    @staticmethod
    def reduce_metrics(logging_outputs: list[dict[str, Any]]) -> None:
        """Log sums over the batches, so that a validation set's metrics are exact."""
        sample_size, ntokens, captions = (total(logging_outputs, k) for k in ("sample_size", "ntokens", "captions"))
        log_bits("loss", total(logging_outputs, "loss"), sample_size)
        log_bits("nll_loss", total(logging_outputs, "nll_loss"), ntokens)
        log_perplexity("ppl", of="nll_loss")
        metrics.log_scalar("accuracy", 100 * total(logging_outputs, "ncorrect") / ntokens, ntokens, round=2)
        if any("cider_sum" in log for log in logging_outputs):
            metrics.log_scalar("cider", 100 * total(logging_outputs, "cider_sum") / captions, captions, round=2)
        log_gate_losses(logging_outputs, sample_size)


def smoothed_divergence(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """``KL(q || p)`` in nats of each row.

    q has ``1 - smoothing`` at the target and ``smoothing`` evenly over all other symbols.

    Args:
        logits: ``(M, V)``.
        targets: ``(M,)`` ids.

    Returns:
        ``(M,)``.
    """
    log_probs = logits.log_softmax(dim=-1)
    at_target = log_probs.gather(1, targets[:, None]).squeeze(1)
    others = logits.size(-1) - 1
    share = smoothing / others
    cross_entropy = -(1 - smoothing - share) * at_target - share * log_probs.sum(-1)
    return cross_entropy + _xlogx(1 - smoothing) + others * _xlogx(share)


def _xlogx(value: float) -> float:
    return value * math.log(value) if value else 0.0
