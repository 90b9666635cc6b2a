"""fairseq tasks and tokenizers; importing registers them."""

from .. import register

register()

from . import (  # noqa: F401  (imported for their registrations)
    captioning,
    finetuning,
    language_modeling,
    masked_multimodal,
    multilingual_language_modeling,
    sentence_classification,
    tokenizers,
)
