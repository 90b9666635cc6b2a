"""TorchScale's BEiT-3 encoder and its layers, whose feed-forward part may be an MH-MoE layer."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torchscale.architecture.encoder import Encoder, EncoderLayer

from ..moe import MHMoEOutput
from .feed_forward import build_dense_ffn
from .multiway import KeyValueCache, Multiway, MultiwaySelfAttention, build_multiway
from .settings import EncoderSettings
from .stack import MoELayerParts, pass_through, replace_norms


class MultiwayEncoderLayer(MoELayerParts, EncoderLayer):
    """Attention, norms and dense networks with weights for each modality; experts shared by both, or for each."""

    def __init__(self, settings: EncoderSettings, depth: int, is_moe_layer: bool = False) -> None:
        super().__init__(settings, depth, is_moe_layer=False)
        self.finish(settings, is_moe_layer, lambda: build_multiway(lambda: settings.build_norm(self.embed_dim)))

    def build_self_attention(self, embed_dim: int, args: EncoderSettings) -> nn.Module:
        """TorchScale's seam: our attention."""
        return MultiwaySelfAttention(args)

    def build_ffn(self, embed_dim: int, args: EncoderSettings) -> nn.Module:
        """TorchScale's seam: a dense feed-forward network for each modality."""
        return build_multiway(lambda: build_dense_ffn(args, embed_dim, self.ffn_dim))

    def forward(
        self,
        x: Tensor,
        image_length: int,
        padding_mask: Tensor | None = None,
        visible: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, MHMoEOutput | None]:
        """One layer, pre-norm or post-norm as the settings say.

        Args:
            x: ``(B, L, D)``, of which the first ``image_length`` positions are the image's.
            padding_mask: bool ``(B, L)``, True = padded: such positions are not routed to experts.
            visible, cache: as in ``MultiwaySelfAttention``.

        Returns:
            ``(B, L, D)``, and losses, statistics and traffic of the experts, or None for a dense layer.
        """
        norm = self.self_attn_layer_norm
        attended = self.self_attn(self.before(norm, x, image_length), image_length, visible, cache)
        x = self.after(norm, x, self.dropout_module(attended), image_length)
        return self.feed_forward(x, padding_mask, image_length)


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
        width = settings.encoder_embed_dim
        norms = ("layer_norm", "layernorm_embedding")
        replace_norms(self, norms, lambda: build_multiway(lambda: settings.build_norm(width)))

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
            visible: as in ``MultiwaySelfAttention``.
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
        for index, layer in enumerate(self.layers):
            cache = None if caches is None else caches[index]
            x, output = pass_through(self, layer, x, image_length, padding_mask, visible, cache)
            outputs.append(output)
        if self.layer_norm is not None and normalize_output:
            x = self.layer_norm(x, image_length)
        return x, {"moe": outputs}
