"""Losses of fine-tuning with a head: over classes, over answers to questions, and between images and their texts."""

from dataclasses import dataclass, field  # fairseq reads the field types: no postponed annotations here
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fairseq.criterions import register_criterion
from fairseq.models import BaseFairseqModel
from omegaconf import II
from torch import Tensor

from ..parallel import gather_rows
from .base import GateLossConfig, Losses, MoECriterion


class ClassificationCriterion(MoECriterion):
    """Cross entropy in nats over the classes, ``targets (B,)`` of the sample, and the share of right answers.

    The model is called with the sample's ``net_input`` and the task's ``head_name``.
    """

    percentages = {"accuracy": ("ncorrect", "sample_size")}
    targets = "targets"

    def logits(self, model: BaseFairseqModel, sample: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """``(B, classes)`` logits and the model's ``extra``."""
        return model(**sample["net_input"], head=self.task.head_name)

    def losses(self, model: BaseFairseqModel, sample: dict[str, Any]) -> Losses:
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

    def logits(self, model: BaseFairseqModel, sample: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
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

    def losses(self, model: BaseFairseqModel, sample: dict[str, Any]) -> Losses:
        """Cross entropies, the scores of the most probable answers, and the ``extra`` of the model's call."""
        logits, extra = self.logits(model, sample)
        scores = sample["targets"].float()
        losses = F.binary_cross_entropy_with_logits(logits.float(), scores, reduction="none").sum(dim=1)
        return losses, {"score": scores.gather(1, logits.argmax(dim=1, keepdim=True)).sum()}, [extra]


class Embeddings(NamedTuple):
    """The images and texts of a batch of all ranks, ``(rows, D)`` of length 1; row i of both belong together."""

    images: Tensor
    texts: Tensor
    own: slice  # this rank's rows
    scale: Tensor  # factor of their similarities
    extras: list[dict[str, Any]]  # what the model's two calls returned beside them


@register_criterion("mhmoe_retrieval", dataclass=GateLossConfig)
class RetrievalCriterion(MoECriterion):
    """``loss = rows * ((c_i + c_t) / 2 + w_b * balance + w_z * z)``, divided by the rows later.

    ``c_i`` is the cross entropy in nats of an image's own text among the texts of all ranks, by similarity times
    ``exp(logit_scale)``, and ``c_t`` that of a text's own image. A rank counts its own rows, so that the sum over
    the ranks is the loss of all. The auxiliary losses are the mean of those of the model's two calls.

    The logs give ``(c_i + c_t) / 2`` in bits (``loss``), and in percent how often an image's own text is the most
    similar of the batch (``image_accuracy``), and a text's own image (``text_accuracy``).
    """

    percentages = {f"{kind}_accuracy": (f"{kind}_correct", "sample_size") for kind in ("image", "text")}

    def embed(self, model: BaseFairseqModel, sample: dict[str, Any]) -> Embeddings:
        """Return the embeddings of a batch, those of all ranks on every rank; all ranks must call it together.

        Args:
            model: called with the sample's images, then with its texts, and the task's ``head_name``.
            sample: row i of ``images`` belongs to row i of ``text_tokens``. Where ``counted`` is False it is only there
                for the calls that all ranks make together, and its rows are compared with none.
        """
        head = self.task.head_name
        images, image_extra = model(images=sample["net_input"]["images"], head=head)
        texts, text_extra = model(text_tokens=sample["net_input"]["text_tokens"], head=head)
        rows = torch.stack([images, texts], dim=1)[_counted(sample)]
        everyone, start = gather_rows(rows)
        images, texts = everyone.unbind(1)
        scale = model.heads[head].logit_scale.float().exp()
        return Embeddings(images, texts, slice(start, start + len(rows)), scale, [image_extra, text_extra])

    def compare(self, found: Embeddings) -> Losses:
        """Return the loss of each of this rank's rows, right answers, and the ``extra`` of the model's calls."""
        images, texts = found.images.float(), found.texts.float()
        to_texts = found.scale * images[found.own] @ texts.T
        to_images = found.scale * texts[found.own] @ images.T
        own = torch.arange(found.own.start, found.own.stop, device=images.device)
        by_text, by_image = (F.cross_entropy(logits, own, reduction="none") for logits in (to_texts, to_images))
        sums = {
            "image_correct": to_texts.argmax(dim=1).eq(own).sum(),
            "text_correct": to_images.argmax(dim=1).eq(own).sum(),
        }
        return (by_text + by_image) / 2, sums, found.extras

    def losses(self, model: BaseFairseqModel, sample: dict[str, Any]) -> Losses:
        """Return what ``compare`` does for a batch."""
        return self.compare(self.embed(model, sample))

    def vectors(self, found: Embeddings, sample: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return a batch's embeddings for recall over a whole set; all ranks must call it together.

        Returns:
            ``(rows,)`` numbers of the texts in their data set and of the image of each; ``(rows, D)`` images and texts.
        """
        ids, _ = gather_rows(torch.stack([sample["id"], sample["image_ids"]], dim=1)[_counted(sample)])
        text_ids, image_ids = ids.unbind(1)
        return text_ids, image_ids, found.images.detach(), found.texts.detach()


def _counted(sample: dict[str, Any]) -> slice:
    return slice(None) if sample.get("counted", True) else slice(0)
