"""Losses over classes: of images, of statements about two images, of sentences, and over answers to questions."""

from dataclasses import dataclass, field  # fairseq reads the field types: no postponed annotations here
from typing import Any

import torch.nn.functional as F
from fairseq.criterions import register_criterion
from omegaconf import II
from torch import Tensor, nn

from .base import GateLossConfig, Losses, MoECriterion


class ClassificationCriterion(MoECriterion):
    """Cross entropy in nats over the classes, ``targets (B,)`` of the sample, and the share of right answers.

    The model is called with the sample's ``net_input`` and the task's ``head_name``.
    """

    percentages = {"accuracy": ("ncorrect", "sample_size")}
    targets = "targets"

    def logits(self, model: nn.Module, sample: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """``(B, classes)`` logits and the model's ``extra``."""
        return model(**sample["net_input"], head=self.task.head_name)

    def losses(self, model: nn.Module, sample: dict[str, Any]) -> Losses:
        """Cross entropies, right answers, and the ``extra`` of the model's call."""
        logits, extra = self.logits(model, sample)
        target = sample[self.targets]
        smoothing = getattr(self.cfg, "label_smoothing", 0.0) if model.training else 0.0
        losses = F.cross_entropy(logits.float(), target, reduction="none", label_smoothing=smoothing)
        sums = {"ncorrect": logits.argmax(dim=1).eq(target).sum()}
        if "accuracy5" in self.percentages:
            best = logits.topk(min(5, logits.size(1)), dim=1).indices
            sums["ncorrect5"] = best.eq(target[:, None]).sum()
        return losses, sums, [extra]


@dataclass
class ImageClassificationConfig(GateLossConfig):
    """Flags of the criterion."""

    label_smoothing: float = field(
        default=0.1, metadata={"help": "share of a target's weight that all classes get alike, in training"}
    )


@register_criterion("mhmoe_image_classification", dataclass=ImageClassificationConfig)
class ImageClassificationCriterion(ClassificationCriterion):
    """Classes of images; also logs ``accuracy5``, how often the right class is among the five most probable."""

    percentages = {"accuracy": ("ncorrect", "sample_size"), "accuracy5": ("ncorrect5", "sample_size")}


@register_criterion("mhmoe_nlvr2", dataclass=GateLossConfig)
class NLVR2Criterion(ClassificationCriterion):
    """Whether a statement about two images is true."""


@dataclass
class SentenceClassificationConfig(GateLossConfig):
    """Flags of the criterion."""

    classification_head_name: str = II("task.classification_head_name")


@register_criterion("mhmoe_sentence_classification", dataclass=SentenceClassificationConfig)
class SentenceClassificationCriterion(ClassificationCriterion):
    """Classes of sentences and pairs, with a classification head of a language model."""

    targets = "target"

    def logits(self, model: nn.Module, sample: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """``(B, classes)`` logits and the decoder's ``extra``."""
        return model(**sample["net_input"], classification_head_name=self.cfg.classification_head_name)


@register_criterion("mhmoe_vqa", dataclass=GateLossConfig)
class VQACriterion(ClassificationCriterion):
    """Binary cross entropy in nats, summed over all answers to a question about an image.

    That is BEiT-3's ``mean over questions and answers * number of answers``. The sample's ``targets`` are
    ``(B, answers)`` soft scores from 0 to 1. ``vqa_score`` in the log is the mean soft score of the most probable
    answers in percent.
    """

    percentages = {"vqa_score": ("score", "sample_size")}

    def losses(self, model: nn.Module, sample: dict[str, Any]) -> Losses:
        """Cross entropies, the scores of the most probable answers, and the ``extra`` of the model's call."""
        logits, extra = self.logits(model, sample)
        scores = sample["targets"].float()
        losses = F.binary_cross_entropy_with_logits(logits.float(), scores, reduction="none").sum(dim=1)
        return losses, {"score": scores.gather(1, logits.argmax(dim=1, keepdim=True)).sum()}, [extra]
