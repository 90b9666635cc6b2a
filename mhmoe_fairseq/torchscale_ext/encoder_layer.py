"""A BEiT-3 encoder layer whose feed-forward part may be an MH-MoE layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchscale.architecture.encoder import EncoderLayer

from ..moe import MHMoELayer, RoutingStats
from ..moe.parallelism import Traffic
from .modules import build_dense_ffn, build_norm
from .multiway import build_multiway
from .multiway_attention import KeyValueCache, MultiwaySelfAttention
from .multiway_experts import SeparateExperts
from .settings import EncoderSettings


class MultiwayEncoderLayer(EncoderLayer):
    """Attention, norms and dense networks with weights for each modality; experts shared by both, or for each.

    Attributes:
        moe_stats: routing counts of the latest forward pass, overwritten by each; None for a dense layer.
        moe_traffic: the same for what it sent to other processes' experts; None without expert parallelism.
    """

    def __init__(self, settings: EncoderSettings, depth: int, is_moe_layer: bool = False) -> None:
        # TorchScale refuses an MoE layer for two modalities: always start from a dense layer.
        super().__init__(settings, depth, is_moe_layer=False)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            setattr(self, name, build_multiway(lambda: build_norm(settings, self.embed_dim)))
        self.moe_stats: RoutingStats | None = None
        self.moe_traffic: Traffic | None = None
        self.separate_experts = settings.separate_experts
        if is_moe_layer:
            assert settings.moe is not None, "moe_freq > 0 without an MHMoEConfig"
            del self.ffn
            self.is_moe_layer = True
            pools = SeparateExperts if settings.separate_experts else MHMoELayer
            self.moe_layer = pools(settings.moe, parallel=settings.parallel)

    def build_self_attention(self, embed_dim: int, args: EncoderSettings) -> nn.Module:
        """TorchScale's seam: our attention."""
        return MultiwaySelfAttention(args)

    def build_ffn(self, embed_dim: int, args: EncoderSettings) -> nn.Module:
        """TorchScale's seam: a dense feed-forward network for each modality."""
        return build_multiway(lambda: build_dense_ffn(args, embed_dim, self.ffn_dim))

    def forward(
        self,
        x: Tensor,
        split: int,
        padding_mask: Tensor | None = None,
        visible: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One layer, pre-norm or post-norm as the settings say.

        Args:
            x: ``(B, L, D)``, of which the first ``split`` positions are the image's.
            padding_mask: bool ``(B, L)``, True = padded: such positions are not routed to experts.
            visible, cache: as in ``MultiwaySelfAttention``.

        Returns:
            ``(B, L, D)`` and the auxiliary losses ``stack([balance, z])``, or None for a dense layer.
        """
        l_aux: Tensor | None = None

        def attend(x: Tensor) -> Tensor:
            return self.dropout_module(self.self_attn(x, split, visible, cache))

        def feed_forward(x: Tensor) -> Tensor:
            nonlocal l_aux
            if not self.is_moe_layer:
                return self.ffn(x, split)
            places = (padding_mask, split) if self.separate_experts else (padding_mask,)
            output = self.moe_layer(x, *places)
            l_aux = torch.stack([output.balance_loss, output.z_loss])
            self.moe_stats = output.stats
            self.moe_traffic = self.moe_layer.traffic
            return output.hidden

        x = self._residual_block(x, split, self.self_attn_layer_norm, attend)
        x = self._residual_block(x, split, self.final_layer_norm, feed_forward)
        return x, l_aux

    def _residual_block(self, x: Tensor, split: int, norm: nn.Module, block: Callable[[Tensor], Tensor]) -> Tensor:
        residual = x
        x = block(norm(x, split) if self.normalize_before else x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        x = self.residual_connection(x, residual)
        return x if self.normalize_before else norm(x, split)
