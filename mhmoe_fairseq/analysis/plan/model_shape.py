"""The sizes of a language model that memory and traffic depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...moe import MHMoEConfig


@dataclass(frozen=True)
class ModelShape:
    """A decoder in numbers.

    Attributes:
        layers, moe_layers: all decoder layers, and those of them with experts.
        embed_dim, ffn_dim, attention_heads: D, the dense networks' inner width, attention's heads.
        vocab_size: entries of the dictionary.
        gated, relu: the activation is SwiGLU, or ReLU; else GELU.
        subln: there is a norm on the inner activation of attention and dense networks.
        dropout, activation_dropout: probabilities; above 0 a mask is kept.
        half: the model computes under autocast in a type of two bytes.
        recompute: activations of a layer are computed again in the backward pass.
        moe: the MoE layers; None for a dense model.
    """

    layers: int
    moe_layers: int
    embed_dim: int
    ffn_dim: int
    attention_heads: int
    vocab_size: int
    gated: bool
    relu: bool
    subln: bool
    dropout: float
    activation_dropout: float
    half: bool
    recompute: bool
    moe: MHMoEConfig | None


def shape_of(model: Any) -> ModelShape:
    """The shape of a model that ``build_language_model`` made, on any device."""
    decoder = model.decoder
    settings = decoder.args
    moe_layers = sum(layer.is_moe_layer for layer in decoder.layers)
    return ModelShape(
        layers=len(decoder.layers),
        moe_layers=moe_layers,
        embed_dim=settings.decoder_embed_dim,
        ffn_dim=settings.decoder_ffn_embed_dim,
        attention_heads=settings.decoder_attention_heads,
        vocab_size=len(decoder.dictionary),
        gated=settings.activation_fn == "silu",
        relu=settings.activation_fn == "relu",
        subln=settings.subln,
        dropout=settings.dropout,
        activation_dropout=settings.activation_dropout,
        half=decoder.precision != "fp32",
        recompute=bool(settings.checkpoint_activations),
        moe=settings.moe if moe_layers else None,
    )
