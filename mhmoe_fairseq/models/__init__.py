"""fairseq models and their named architectures; importing registers them."""

from . import architectures, beit3, language_model, options

__all__ = ["architectures", "beit3", "language_model", "options"]
