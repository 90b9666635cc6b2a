"""The layers of decoders and encoders: attention, then a dense network or experts, pre-norm or post-norm."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchscale.architecture.decoder import DecoderLayer
from torchscale.architecture.encoder import EncoderLayer

from ..moe import MHMoEOutput
from ..moe.lory import SegmentMemory
from .attention import KeyValueCache, MultiwaySelfAttention, SelfAttention
from .feed_forward import build_dense_ffn, build_feed_forward
from .settings import DecoderSettings, EncoderSettings, Settings


class _MoELayer(nn.Module):
    """In front of a TorchScale layer, which is built dense: with our norms and, as an MoE layer, with experts.

    TorchScale would build its own MoE layer, which needs a process group and knows one modality. Arguments called
    ``image_length`` are one, the image's positions, in encoders, and none in decoders.
    """

    self_attn: nn.Module
    self_attn_layer_norm: nn.Module
    final_layer_norm: nn.Module
    ffn: nn.Module
    ffn_dim: int
    moe_layer: nn.Module
    is_moe_layer: bool
    normalize_before: bool
    dropout_module: nn.Module
    drop_path: nn.Module | None
    residual_connection: Callable[[Tensor, Tensor], Tensor]

    def __init__(self, settings: Settings, depth: int, is_moe_layer: bool = False) -> None:
        super().__init__(settings, depth, is_moe_layer=False)
        settings.replace_norms(self, "self_attn_layer_norm", "final_layer_norm")
        if is_moe_layer:
            del self.ffn
            self.is_moe_layer = True
            self.moe_layer = build_feed_forward(settings)

    def build_ffn(self, embed_dim: int, settings: Settings) -> nn.Module:
        """TorchScale's seam: the dense feed-forward network, one for each modality in an encoder."""
        return settings.for_modalities(lambda: build_dense_ffn(settings, embed_dim, self.ffn_dim))

    def forward(
        self,
        x: Tensor,
        *image_length: int,
        padding_mask: Tensor | None = None,
        visible: Tensor | None = None,
        cache: KeyValueCache | None = None,
        is_causal: bool = False,
        domain: Tensor | None = None,
    ) -> tuple[Tensor, MHMoEOutput | None]:
        """One layer.

        Args:
            x: ``(B, S, D)``.
            padding_mask: bool ``(B, S)``, True = padded: such positions are not routed to experts.
            visible, cache, is_causal: as in ``SelfAttention``.
            domain: int64 ``(B, S)``, for experts that are chosen by it.

        Returns:
            ``(B, S, D)``, and losses, statistics and traffic of the experts, or None for a dense layer.
        """
        norm, output = self.self_attn_layer_norm, None
        y = self._before(norm, x, *image_length)
        attended = self.self_attn(y, *image_length, visible=visible, cache=cache, is_causal=is_causal)
        x = self._after(norm, x, self.dropout_module(attended), *image_length)
        y = self._before(self.final_layer_norm, x, *image_length)
        if self.is_moe_layer:
            by_domain = {} if domain is None else {"domain": domain}
            output = self.moe_layer(y, padding_mask, *image_length, *self._memory(cache), **by_domain)
            y, output = output.hidden, output.without_hidden()
        else:
            y = self.ffn(y, *image_length)
        return self._after(self.final_layer_norm, x, y, *image_length), output

    def _memory(self, cache: KeyValueCache | None) -> list[SegmentMemory]:
        """What experts that depend on earlier steps keep of them, in incremental decoding; nothing of others."""
        new_memory = getattr(self.moe_layer, "new_memory", None)
        if cache is None or new_memory is None:
            return []
        cache.memory = cache.memory or new_memory()
        return [cache.memory]

    def _before(self, norm: nn.Module, x: Tensor, *image_length: int) -> Tensor:
        """What a half of the layer gets."""
        return norm(x, *image_length) if self.normalize_before else x

    def _after(self, norm: nn.Module, x: Tensor, y: Tensor, *image_length: int) -> Tensor:
        """What the half that made ``y`` of ``x`` hands on."""
        if self.drop_path is not None:
            y = self.drop_path(y)
        x = self.residual_connection(y, x)
        return x if self.normalize_before else norm(x, *image_length)


class MHMoEDecoderLayer(_MoELayer, DecoderLayer):
    """A layer over one modality."""

    def build_self_attention(self, embed_dim: int, settings: DecoderSettings) -> nn.Module:
        """TorchScale's seam: our attention."""
        return SelfAttention(settings, embed_dim, settings.decoder_attention_heads)


class MultiwayEncoderLayer(_MoELayer, EncoderLayer):
    """Attention, norms and dense networks with weights for each modality; experts shared by both, or for each."""

    def build_self_attention(self, embed_dim: int, settings: EncoderSettings) -> nn.Module:
        """TorchScale's seam: our attention."""
        return MultiwaySelfAttention(settings, embed_dim, settings.encoder_attention_heads)


def pass_through(stack: Any, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Tensor, MHMoEOutput | None]:
    """Call a layer of a decoder or encoder, in training with its activations recomputed where the settings say so."""
    if stack.args.checkpoint_activations and stack.training and torch.is_grad_enabled():
        # torch's own checkpointing, not fairscale's: that one recomputes outside bf16 autocast.
        layer = functools.partial(checkpoint, layer, use_reentrant=False)
    return layer(*args, **kwargs)
