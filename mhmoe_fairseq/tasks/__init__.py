"""fairseq tasks and tokenizers; importing registers them."""

from . import (
    language_modeling,
    multilingual_language_modeling,
    sentence_classification,
    sentencepiece_bpe,
    tiktoken_bpe,
)

__all__ = [
    "language_modeling",
    "multilingual_language_modeling",
    "sentence_classification",
    "sentencepiece_bpe",
    "tiktoken_bpe",
]
