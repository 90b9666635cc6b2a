"""fairseq criterions; importing registers them."""

from . import (
    captioning,
    gate_losses,
    image_classification,
    masked_multimodal,
    moe_cross_entropy,
    retrieval,
    sentence_classification,
    visual_questions,
)

__all__ = [
    "captioning",
    "gate_losses",
    "masked_multimodal",
    "moe_cross_entropy",
    "image_classification",
    "retrieval",
    "sentence_classification",
    "visual_questions",
]
