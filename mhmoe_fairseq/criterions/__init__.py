"""fairseq criterions; importing registers them."""

from . import moe_cross_entropy

__all__ = ["moe_cross_entropy"]
