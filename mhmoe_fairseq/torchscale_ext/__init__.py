"""The bridge to TorchScale: decoder layers with MH-MoE, attention, positions, and flags -> configurations."""

from .decoder import MHMoEDecoder
from .layers import MHMoEDecoderLayer
from .settings import DecoderSettings

__all__ = ["DecoderSettings", "MHMoEDecoder", "MHMoEDecoderLayer"]
