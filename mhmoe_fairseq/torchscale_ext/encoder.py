"""TorchScale's BEiT-3 encoder with MH-MoE layers."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torchscale.architecture.encoder import Encoder

from .attention import KeyValueCache
from .layers import MultiwayEncoderLayer, pass_through
from .settings import EncoderSettings, Multiway


class MultiwayEncoder(Encoder):
    """Encoder over ``[image | text]`` with an MoE layer every ``moe_freq`` layers.

    Args:
        settings: everything about the layers.
        embed_positions: the tables of positions, which TorchScale keeps in the encoder.

    TorchScale rescales the initial weights by name under sub-LN and deepnorm: those of attention's value and output
    maps and of dense networks in both modalities, and the experts' ``fc1_weight`` and ``fc2_weight``. Routers, SwiGLU
    gates and the head and merge projections, which no such rule was derived for, are not, nor is anything outside the
    encoder.
    """

    def __init__(self, settings: EncoderSettings, embed_positions: Multiway) -> None:
        super().__init__(settings, embed_tokens=None, embed_positions=embed_positions, output_projection=None)
        settings.replace_norms(self, "layer_norm", "layernorm_embedding")

    def build_encoder_layer(
        self, args: EncoderSettings, depth: int, is_moe_layer: bool = False, is_encoder_decoder: bool = False
    ) -> nn.Module:
        """TorchScale's seam: our layer. Activation checkpointing is done in ``forward``."""
        return MultiwayEncoderLayer(args, depth, is_moe_layer)

    def forward(
        self,
        x: Tensor,
        image_length: int,
        padding_mask: Tensor | None = None,
        visible: Tensor | None = None,
        caches: Sequence[KeyValueCache] | None = None,
        normalize_output: bool = True,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Features of every position.

        Args:
            x: ``(B, L, D)``, embedded with positions; the first ``image_length`` positions are the image's.
            padding_mask: bool ``(B, L)``, True = padded.
            visible: as in ``SelfAttention``.
            caches: one for each layer, extended.
            normalize_output: whether the final norm is applied, if there is one.

        Returns:
            ``(B, L, D)``, and ``extra`` with one entry per layer in ``moe``, as a decoder's.
        """
        if self.layernorm_embedding is not None:
            x = self.layernorm_embedding(x, image_length)
        x = self.dropout_module(x)
        if padding_mask is not None:
            x = x.masked_fill(padding_mask.unsqueeze(-1), 0)
        outputs = []
        masks = {"padding_mask": padding_mask, "visible": visible}
        of_layers: Sequence[KeyValueCache | None] = caches or [None] * len(self.layers)
        for layer, cache in zip(self.layers, of_layers):
            x, output = pass_through(self, layer, x, image_length, **masks, cache=cache)
            outputs.append(output)
        if self.layer_norm is not None and normalize_output:
            x = self.layer_norm(x, image_length)
        return x, {"moe": outputs}
