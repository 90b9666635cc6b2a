"""What decoders and encoders have in common: the two halves of a layer, and the pass through all layers."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..moe import MHMoEOutput
from .feed_forward import build_feed_forward
from .settings import Settings

BuildNorm = Callable[[], nn.Module]


def replace_norms(module: nn.Module, names: tuple[str, ...], build: BuildNorm) -> None:
    """Put ``build()`` where ``module`` has a norm under one of the names."""
    for name in names:
        if getattr(module, name) is not None:
            setattr(module, name, build())


class MoELayerParts:
    """In front of a TorchScale layer, which is built dense: pre-norm or post-norm, dense or with experts.

    TorchScale would build its own MoE layer, which needs a process group and knows one modality. Arguments called
    ``image_length`` are one, the image's positions, in encoders, and none in decoders.
    """

    def finish(self, settings: Settings, is_moe_layer: bool, build_norm: BuildNorm) -> None:
        """Our norms and, where the layer is to have them, experts in place of what TorchScale built."""
        replace_norms(self, ("self_attn_layer_norm", "final_layer_norm"), build_norm)
        if is_moe_layer:
            del self.ffn
            self.is_moe_layer = True
            self.moe_layer = build_feed_forward(settings)

    def before(self, norm: nn.Module, x: Tensor, *image_length: int) -> Tensor:
        """What a half of the layer gets."""
        return norm(x, *image_length) if self.normalize_before else x

    def after(self, norm: nn.Module, x: Tensor, y: Tensor, *image_length: int) -> Tensor:
        """What the half that made ``y`` of ``x`` hands on."""
        if self.drop_path is not None:
            y = self.drop_path(y)
        x = self.residual_connection(y, x)
        return x if self.normalize_before else norm(x, *image_length)

    def feed_forward(
        self, x: Tensor, padding_mask: Tensor | None, *image_length: int
    ) -> tuple[Tensor, MHMoEOutput | None]:
        """The second half: ``(B, S, D)``, and what the experts did besides; None for a dense layer."""
        norm, output = self.final_layer_norm, None
        y = self.before(norm, x, *image_length)
        if self.is_moe_layer:
            output = self.moe_layer(y, padding_mask, *image_length)
            y, output = output.hidden, output.without_hidden()
        else:
            y = self.ffn(y, *image_length)
        return self.after(norm, x, y, *image_length), output


def pass_through(stack: Any, layer: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, MHMoEOutput | None]:
    """Call a layer of a decoder or encoder, in training with its activations recomputed where the settings say so."""
    if stack.args.checkpoint_activations and stack.training and torch.is_grad_enabled():
        # torch's own checkpointing, not fairscale's: that one recomputes outside bf16 autocast.
        layer = functools.partial(checkpoint, layer, use_reentrant=False)
    return layer(*args, **kwargs)
