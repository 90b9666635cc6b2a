"""fairseq models and their named architectures; importing registers them."""

from . import architectures, language_model, options

__all__ = ["architectures", "language_model", "options"]
