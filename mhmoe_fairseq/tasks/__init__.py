"""fairseq tasks and tokenizers; importing registers them."""

from .. import register

register()

from . import (
    captioning,
    image_classification,
    language_modeling,
    masked_multimodal,
    multilingual_language_modeling,
    nlvr2,
    retrieval,
    sentence_classification,
    tokenizers,
    vqa,
)

__all__ = [
    "captioning",
    "image_classification",
    "language_modeling",
    "masked_multimodal",
    "multilingual_language_modeling",
    "nlvr2",
    "retrieval",
    "sentence_classification",
    "tokenizers",
    "vqa",
]
