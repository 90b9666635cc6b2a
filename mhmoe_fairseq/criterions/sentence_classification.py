"""Cross entropy over the classes of sentences and pairs, with a head on a language model."""

from dataclasses import dataclass  # fairseq reads the field types: no postponed annotations here
from typing import Any

from fairseq.criterions import register_criterion
from omegaconf import II
from torch import Tensor, nn

from .classification import ClassificationCriterion
from .gate_losses import GateLossConfig


@dataclass
class SentenceClassificationConfig(GateLossConfig):
    """Flags of the criterion."""

    classification_head_name: str = II("task.classification_head_name")


@register_criterion("mhmoe_sentence_classification", dataclass=SentenceClassificationConfig)
class SentenceClassificationCriterion(ClassificationCriterion):
    """The loss of :class:`.classification.ClassificationCriterion`, of a language model's classification head."""

    targets = "target"

    def __init__(
        self,
        task: Any,
        moe_gate_loss_wt: float,
        moe_gate_loss_combine_method: str,
        mhmoe_z_loss_wt: float,
        classification_head_name: str,
    ) -> None:
        super().__init__(task, moe_gate_loss_wt, moe_gate_loss_combine_method, mhmoe_z_loss_wt)
        self.head_name = classification_head_name

    def logits(self, model: nn.Module, sample: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """``(B, classes)`` logits and the decoder's ``extra``."""
        return model(**sample["net_input"], classification_head_name=self.head_name)
