"""fairseq criterions; importing registers them."""

from . import (
    captioning,
    gate_losses,
    masked_multimodal,
    moe_cross_entropy,
    picture_classification,
    retrieval,
    sentence_classification,
    visual_questions,
)

__all__ = [
    "captioning",
    "gate_losses",
    "masked_multimodal",
    "moe_cross_entropy",
    "picture_classification",
    "retrieval",
    "sentence_classification",
    "visual_questions",
]
