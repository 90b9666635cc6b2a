"""fairseq tasks and tokenizers; importing registers them."""

from . import language_modeling, sentencepiece_bpe, tiktoken_bpe

__all__ = ["language_modeling", "sentencepiece_bpe", "tiktoken_bpe"]
