"""A TorchScale decoder layer whose feed-forward part may be an MH-MoE layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchscale.architecture.decoder import DecoderLayer

from ..moe import MHMoELayer, RoutingStats
from ..moe.parallelism import Traffic
from .attention import SelfAttention
from .modules import build_dense_ffn, build_norm
from .settings import DecoderSettings
from .static_xmoe import StaticXMoE


class MHMoEDecoderLayer(DecoderLayer):
    """Self-attention and a feed-forward part: dense, MH-MoE, or TorchScale's static X-MoE.

    Attributes:
        moe_stats: routing counts of the latest forward pass, overwritten by each; None for a dense layer.
        moe_traffic: the same for what it sent to other processes' experts; None without expert parallelism.
    """

    def __init__(self, settings: DecoderSettings, depth: int, is_moe_layer: bool = False) -> None:
        # TorchScale would build its own MoE layer, which needs a process group: always start from a dense layer.
        super().__init__(settings, depth, is_moe_layer=False)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            setattr(self, name, build_norm(settings, self.embed_dim))
        self.moe_stats: RoutingStats | None = None
        self.moe_traffic: Traffic | None = None
        if is_moe_layer:
            del self.ffn
            self.is_moe_layer = True
            self.moe_layer = build_moe_layer(settings)

    def build_self_attention(self, embed_dim: int, args: DecoderSettings) -> nn.Module:
        """TorchScale's seam: our attention."""
        return SelfAttention(args)

    def build_ffn(self, embed_dim: int, args: DecoderSettings) -> nn.Module:
        """TorchScale's seam: the dense feed-forward network."""
        return build_dense_ffn(args, embed_dim, self.ffn_dim)

    def forward(
        self,
        x: Tensor,
        incremental_state: dict | None = None,
        padding_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_first_step: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """One layer, pre-norm or post-norm as the settings say.

        Args:
            x: ``(B, S, D)``; in incremental decoding S is 1, or the prefix's length at the first step.
            incremental_state: this layer's own dictionary of past keys and values, or None.
            padding_mask: bool ``(B, S)``, True = padded: such tokens are not routed to experts.
            key_padding_mask: bool ``(B, all keys)``, True = never attended to. Right padding needs none: a causal
                query sees no later key.
            is_first_step: the incremental state is empty and the whole prefix comes at once.

        Returns:
            ``(B, S, D)`` and the auxiliary losses ``stack([balance, z])``, or None for a dense layer.
        """
        causal = incremental_state is None or is_first_step

        def attend(x: Tensor) -> Tensor:
            attended, _ = self.self_attn(
                x, incremental_state=incremental_state, key_padding_mask=key_padding_mask, is_causal=causal
            )
            return self.dropout_module(attended)

        l_aux: Tensor | None = None

        def feed_forward(x: Tensor) -> Tensor:
            nonlocal l_aux
            if not self.is_moe_layer:
                return self.ffn(x)
            output = self.moe_layer(x, padding_mask)
            l_aux = torch.stack([output.balance_loss, output.z_loss])
            self.moe_stats = output.stats
            self.moe_traffic = getattr(self.moe_layer, "traffic", None)
            return output.hidden

        x = self._residual_block(x, self.self_attn_layer_norm, attend)
        x = self._residual_block(x, self.final_layer_norm, feed_forward)
        return x, l_aux

    def _residual_block(self, x: Tensor, norm: nn.Module, block) -> Tensor:
        residual = x
        x = block(norm(x) if self.normalize_before else x)
        x = self.residual_connection(x, residual)
        return x if self.normalize_before else norm(x)


def build_moe_layer(settings: DecoderSettings) -> nn.Module:
    """The MoE layer that the settings describe; called as ``(x, padding_mask)``, returns an ``MHMoEOutput``."""
    assert settings.moe is not None, "moe_freq > 0 without an MHMoEConfig"
    return StaticXMoE(settings) if settings.static_xmoe else MHMoELayer(settings.moe, parallel=settings.parallel)
