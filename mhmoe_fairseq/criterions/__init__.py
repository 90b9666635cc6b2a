"""fairseq criterions; importing registers them."""

from . import gate_losses, moe_cross_entropy, sentence_classification

__all__ = ["gate_losses", "moe_cross_entropy", "sentence_classification"]
