"""What a decoder is built from: TorchScale's ``DecoderConfig`` and the options it lacks."""

from __future__ import annotations

from typing import Any

from torchscale.architecture.config import DecoderConfig

from ..moe import MHMoEConfig
from ..moe.parallelism import ExpertParallelism


class DecoderSettings(DecoderConfig):
    """TorchScale's decoder configuration with MH-MoE layers, rotary positions, RMSNorm and bias-free maps.

    Built in one call and never through ``DecoderConfig.override``, which drops unknown names and skips the
    constructor's rules for ``subln`` and ``deepnorm``.

    Args:
        moe: the MoE layers' configuration; None for a dense model.
        parallel: the processes that the MoE layers extend over; None for one.
        static_xmoe: run TorchScale's own static routing in place of ours (a baseline).
        rotary_embed: rotate queries and keys by their position.
        rms_norm: RMSNorm in place of LayerNorm.
        no_bias: no bias in any linear map.
        decoder_kwargs: ``DecoderConfig``'s own arguments.
    """

    def __init__(
        self,
        *,
        moe: MHMoEConfig | None = None,
        parallel: ExpertParallelism | None = None,
        static_xmoe: bool = False,
        rotary_embed: bool = False,
        rms_norm: bool = False,
        no_bias: bool = False,
        **decoder_kwargs: Any,
    ) -> None:
        super().__init__(**decoder_kwargs)
        self.moe = moe
        self.parallel = parallel
        self.static_xmoe = static_xmoe
        self.rotary_embed = rotary_embed
        self.rms_norm = rms_norm
        self.no_bias = no_bias
