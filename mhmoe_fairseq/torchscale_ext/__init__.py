"""The bridge to TorchScale: decoders and encoders with MH-MoE layers, attention, positions, and their settings."""

from .beit3 import MultiwayBEiT3
from .decoder import MHMoEDecoder
from .encoder import MultiwayEncoder
from .layers import MHMoEDecoderLayer, MultiwayEncoderLayer
from .settings import DecoderSettings, EncoderSettings

__all__ = [
    "DecoderSettings",
    "EncoderSettings",
    "MHMoEDecoder",
    "MHMoEDecoderLayer",
    "MultiwayBEiT3",
    "MultiwayEncoder",
    "MultiwayEncoderLayer",
]
