"""What decoders and encoders are built from: TorchScale's configurations and the options they lack.

Built in one call and never through TorchScale's ``override``, which drops unknown names and skips the constructors'
rules for ``subln`` and ``deepnorm``.
"""

from __future__ import annotations

from typing import Any

from torchscale.architecture.config import DecoderConfig, EncoderConfig

from ..moe import MHMoEConfig
from ..moe.parallelism import ExpertParallelism

# TorchScale's position tables leave their first rows unused, as fairseq's do.
UNUSED_POSITIONS = 2


class _LayerSettings:
    """In front of a TorchScale configuration: what layers of both kinds take.

    Args:
        moe: the MoE layers' configuration; None for a dense model.
        parallel: the processes that the MoE layers extend over; None for one.
        rms_norm: RMSNorm in place of LayerNorm.
        no_bias: no bias in any linear map.
        torchscale: the configuration's own arguments.
    """

    def __init__(
        self,
        *,
        moe: MHMoEConfig | None = None,
        parallel: ExpertParallelism | None = None,
        rms_norm: bool = False,
        no_bias: bool = False,
        **torchscale: Any,
    ) -> None:
        super().__init__(**torchscale)
        self.moe = moe
        self.parallel = parallel
        self.rms_norm = rms_norm
        self.no_bias = no_bias


class DecoderSettings(_LayerSettings, DecoderConfig):
    """TorchScale's decoder configuration with MH-MoE layers, rotary positions, RMSNorm and bias-free maps.

    Args:
        static_xmoe: run TorchScale's own static routing in place of ours (a baseline).
        rotary_embed: rotate queries and keys by their position.
        more: of ``_LayerSettings`` and ``DecoderConfig``.
    """

    def __init__(self, *, static_xmoe: bool = False, rotary_embed: bool = False, **more: Any) -> None:
        super().__init__(**more)
        self.static_xmoe = static_xmoe
        self.rotary_embed = rotary_embed


class EncoderSettings(_LayerSettings, EncoderConfig):
    """TorchScale's configuration of BEiT-3, with MH-MoE layers, RMSNorm and bias-free maps.

    Args:
        separate_experts: images and text have a pool of experts each.
        max_text_length: the longest text, in tokens.
        more: of ``_LayerSettings`` and ``EncoderConfig``.
    """

    def __init__(self, *, separate_experts: bool = False, max_text_length: int = 64, **more: Any) -> None:
        # Not multiway: TorchScale's own multiway modules are not used.
        super().__init__(no_output_layer=True, max_source_positions=max_text_length + UNUSED_POSITIONS, **more)
        self.separate_experts = separate_experts
        self.max_text_length = max_text_length
