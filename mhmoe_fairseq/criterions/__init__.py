"""fairseq criterions; importing registers them."""

from .. import register

register()

from . import captioning, finetuning, masked_multimodal, moe_cross_entropy  # noqa: F401
