"""Cross entropy over classes of images, and of statements about two images."""

from dataclasses import dataclass, field  # fairseq reads the field types: no postponed annotations here

from fairseq.criterions import register_criterion

from .classification import ClassificationCriterion
from .gate_losses import GateLossConfig


@dataclass
class ImageClassificationConfig(GateLossConfig):
    """Flags of the criterion."""

    label_smoothing: float = field(
        default=0.1, metadata={"help": "share of a target's weight that all classes get alike, in training"}
    )


@register_criterion("mhmoe_image_classification", dataclass=ImageClassificationConfig)
class ImageClassificationCriterion(ClassificationCriterion):
    """Classes of images; also logs ``accuracy5``, how often the right class is among the five most probable."""

    uses_top5 = True


@register_criterion("mhmoe_nlvr2", dataclass=GateLossConfig)
class NLVR2Criterion(ClassificationCriterion):
    """Whether a statement about two images is true."""
