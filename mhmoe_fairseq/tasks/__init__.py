"""fairseq tasks and tokenizers; importing registers them."""

from . import language_modeling, tiktoken_bpe

__all__ = ["language_modeling", "tiktoken_bpe"]
