"""fairseq criterions; importing registers them."""

from .. import register

register()

from . import captioning, classification, masked_multimodal, moe_cross_entropy, retrieval  # noqa: F401
