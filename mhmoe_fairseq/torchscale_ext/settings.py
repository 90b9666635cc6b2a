"""What decoders and encoders are built from: TorchScale's configurations and the options they lack.

Built in one call and never through TorchScale's ``override``, which drops unknown names and skips the constructors'
rules for ``subln`` and ``deepnorm``.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torchscale.architecture.config import DecoderConfig, EncoderConfig

from ..moe import MHMoEConfig
from ..moe.activations import ACTIVATIONS, BY_FLAG, Activation
from ..moe.parallelism import ExpertParallelism
from ..moe.quantize import TernaryLinear

# TorchScale's position tables leave their first rows unused, as fairseq's do.
UNUSED_POSITIONS = 2
_Module = TypeVar("_Module", bound=nn.Module)


class Multiway(nn.Module):
    """``A`` for the image's positions, ``B`` for the text's; parameter names are TorchScale's.

    A sequence is ``[image positions | text positions]``; ``image_length`` says how many of its positions are the
    image's. It is an argument everywhere: TorchScale keeps it in an attribute of every module, which the next call
    overwrites. So TorchScale is told to build for one modality, and what it built gives way to these modules.
    A modality without positions does not call its module, so a batch of images leaves the text's weights without
    gradients.
    """

    def __init__(self, image: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.A = image
        self.B = text

    def forward(self, x: Tensor, image_length: int) -> Tensor:
        """``(B, L, ...) -> (B, L, ...)``, of which the first ``image_length`` positions go through A."""
        if image_length == x.size(1):
            return self.A(x)
        if image_length == 0:
            return self.B(x)
        return torch.cat([self.A(x[:, :image_length]), self.B(x[:, image_length:])], dim=1)


class _LayerSettings:
    """In front of a TorchScale configuration: what layers of both kinds take.

    Args:
        moe: the MoE layers' configuration; None for a dense model.
        feed_forward: which layer computes it, a name in ``feed_forward.FEED_FORWARDS``: ``"moe"``, for each modality
            a pool of experts (``"separate"``, encoders only), or TorchScale's static layer (``"torchscale"``).
        parallel: the processes that the MoE layers extend over; None for one.
        rms_norm: RMSNorm in place of LayerNorm.
        no_bias: no bias in any linear map.
        quantize_maps: ternary weights and inputs of eight bits in attention's and dense networks' linear maps.
        torchscale: the configuration's own arguments.
    """

    rotary_embed = False
    activation_fn: str
    layernorm_eps: float

    def __init__(
        self,
        *,
        moe: MHMoEConfig | None = None,
        feed_forward: str = "moe",
        parallel: ExpertParallelism | None = None,
        rms_norm: bool = False,
        no_bias: bool = False,
        quantize_maps: bool = False,
        **torchscale: Any,
    ) -> None:
        super().__init__(**torchscale)
        self.moe = moe
        self.feed_forward = feed_forward
        self.parallel = parallel
        self.rms_norm = rms_norm
        self.no_bias = no_bias
        self.quantize_maps = quantize_maps

    @property
    def experts(self) -> MHMoEConfig:
        """The MoE layers' configuration, of a model that has such layers."""
        assert self.moe is not None, "moe_freq > 0 without an MHMoEConfig"
        return self.moe

    @property
    def activation(self) -> Activation:
        """What ``activation_fn`` names in experts and dense networks: ``silu`` means SwiGLU."""
        return ACTIVATIONS[BY_FLAG.get(self.activation_fn, self.activation_fn)]

    def build_norm(self, dim: int) -> nn.Module:
        """RMSNorm or LayerNorm over ``dim`` features."""
        kind = nn.RMSNorm if self.rms_norm else nn.LayerNorm
        return kind(dim, eps=self.layernorm_eps)

    def for_modalities(self, build: Callable[[], nn.Module]) -> nn.Module:
        """What ``build`` makes; in an encoder a module for each modality, with initial values of their own."""
        return build()

    def replace_norms(self, module: nn.Module, *names: str) -> None:
        """Put our norms where ``module`` has one of TorchScale's under one of the names."""
        for name in names:
            norm = getattr(module, name)
            if norm is not None:
                build = functools.partial(self.build_norm, *norm.normalized_shape)
                setattr(module, name, self.for_modalities(build))

    def fit_maps(self, module: _Module) -> _Module:
        """``module``, all linear maps inside it with or without bias and ternary as the settings say."""
        for parent in list(module.modules()):
            for name, child in parent.named_children():
                if not isinstance(child, nn.Linear):
                    continue
                if self.no_bias:
                    child.register_parameter("bias", None)
                if self.quantize_maps:
                    setattr(parent, name, TernaryLinear.of(child))
        return module


class DecoderSettings(_LayerSettings, DecoderConfig):
    """TorchScale's decoder configuration with MH-MoE layers, RMSNorm and bias-free maps.

    Args:
        rotary_embed: rotate queries and keys by their position.
        more: of ``_LayerSettings`` and ``DecoderConfig``.
    """

    def __init__(self, *, rotary_embed: bool = False, **more: Any) -> None:
        super().__init__(**more)
        self.rotary_embed = rotary_embed


class EncoderSettings(_LayerSettings, EncoderConfig):
    """TorchScale's configuration of BEiT-3, with MH-MoE layers, RMSNorm and bias-free maps.

    Args:
        max_text_length: the longest text, in tokens.
        more: of ``_LayerSettings`` and ``EncoderConfig``.
    """

    def __init__(self, *, max_text_length: int = 64, **more: Any) -> None:
        # Not multiway: TorchScale's own multiway modules are not used.
        super().__init__(no_output_layer=True, max_source_positions=max_text_length + UNUSED_POSITIONS, **more)
        self.max_text_length = max_text_length

    def for_modalities(self, build: Callable[[], nn.Module]) -> nn.Module:
        """A module for each modality."""
        return Multiway(build(), build())


Settings = DecoderSettings | EncoderSettings
