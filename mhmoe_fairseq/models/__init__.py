"""fairseq models and their named architectures; importing registers them."""

from .. import register

register()

from . import architectures, beit3, language_model, options

__all__ = ["architectures", "beit3", "language_model", "options"]
