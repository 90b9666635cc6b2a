"""The bridge to TorchScale: decoder and encoder layers with MH-MoE, attention, positions, flags -> configurations."""

from .beit3 import MultiwayBEiT3
from .decoder import MHMoEDecoder
from .decoder_layer import MHMoEDecoderLayer
from .encoder import MultiwayEncoder
from .encoder_layer import MultiwayEncoderLayer
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
