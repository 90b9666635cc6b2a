"""TorchScale's BEiT-3 encoder built from MH-MoE encoder layers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchscale.architecture.encoder import Encoder

from .encoder_layer import MultiwayEncoderLayer
from .modules import build_norm
from .multiway import Multiway, build_multiway
from .multiway_attention import KeyValueCache
from .settings import EncoderSettings


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
        for name in ("layer_norm", "layernorm_embedding"):
            if getattr(self, name) is not None:
                setattr(self, name, build_multiway(lambda: build_norm(settings, settings.encoder_embed_dim)))

    def build_encoder_layer(
        self, args: EncoderSettings, depth: int, is_moe_layer: bool = False, is_encoder_decoder: bool = False
    ) -> nn.Module:
        """TorchScale's seam: our layer. Activation checkpointing is done in ``forward``."""
        return MultiwayEncoderLayer(args, depth, is_moe_layer)

    def forward(
        self,
        x: Tensor,
        split: int,
        padding_mask: Tensor | None = None,
        visible: Tensor | None = None,
        caches: Sequence[KeyValueCache] | None = None,
        normalize_output: bool = True,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Features of every position.

        Args:
            x: ``(B, L, D)``, embedded with positions; the first ``split`` positions are the image's.
            padding_mask: bool ``(B, L)``, True = padded.
            visible: as in ``MultiwaySelfAttention``.
            caches: one for each layer, extended.
            normalize_output: whether the final norm is applied, if there is one.

        Returns:
            ``(B, L, D)``, and one entry per layer (None for dense ones) in ``l_aux``, ``stack([balance, z])``, and
            ``moe_stats``, a ``RoutingStats``; under expert parallelism in ``moe_traffic``, too, a ``Traffic``.
        """
        if self.layernorm_embedding is not None:
            x = self.layernorm_embedding(x, split)
        x = self.dropout_module(x)
        if padding_mask is not None:
            x = x.masked_fill(padding_mask.unsqueeze(-1), 0)
        extra: dict[str, Any] = {"l_aux": [], "moe_stats": [], "moe_traffic": []}
        for index, layer in enumerate(self.layers):
            cache = None if caches is None else caches[index]
            run = functools.partial(checkpoint, layer, use_reentrant=False) if self._recomputes() else layer
            x, l_aux = run(x, split, padding_mask, visible, cache)
            extra["l_aux"].append(l_aux)
            extra["moe_stats"].append(layer.moe_stats if layer.is_moe_layer else None)
            extra["moe_traffic"].append(layer.moe_traffic)
        if self.layer_norm is not None and normalize_output:
            x = self.layer_norm(x, split)
        return x, extra

    def _recomputes(self) -> bool:
        return self.args.checkpoint_activations and self.training and torch.is_grad_enabled()
