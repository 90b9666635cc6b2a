"""What is benchmarked: the sizes of one measurement and the work they imply."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from mhmoe_fairseq.moe import MHMoEConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BALANCE_WEIGHT = 0.01


@dataclass(frozen=True)
class Setting:
    """One point of the sweep.

    Args:
        tokens: tokens T in the batch; the layer splits them into N = T * H sub-tokens.
        num_experts: experts E.
        dtype: ``"fp32"`` or ``"bf16"`` (weights, inputs and gradients alike).
        embed_dim: model dimension D.
        num_heads: MH-MoE heads H.
        top_k: experts per sub-token K.
        ffn_dim: inner width F of one GELU expert (two matrices).
    """

    tokens: int
    num_experts: int
    dtype: str = "fp32"
    embed_dim: int = 768
    num_heads: int = 4
    top_k: int = 2
    ffn_dim: int = 3072

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype ({self.dtype}) must be one of {', '.join(DTYPES)}")
        if self.tokens < 1:
            raise ValueError(f"tokens ({self.tokens}) must be at least 1")
        self.config()  # the layer's own checks: heads divide the width, k at most E, ...

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def sub_dim(self) -> int:
        """Width d of a sub-token."""
        return self.embed_dim // self.num_heads

    @property
    def num_subtokens(self) -> int:
        return self.tokens * self.num_heads

    @property
    def num_rows(self) -> int:
        """Routed rows R = T * H * K, the rows the experts multiply."""
        return self.num_subtokens * self.top_k

    @property
    def swiglu_dim(self) -> int:
        """Inner width at which a SwiGLU expert (three matrices) costs the FLOPs of the GELU one."""
        return 2 * self.ffn_dim // 3

    def flops(self) -> int:
        """Multiply-adds counted twice, forward and both backward products, experts and projections."""
        experts = 2 * self.num_rows * self.sub_dim * self.ffn_dim
        projections = 2 * self.tokens * self.embed_dim**2
        return 3 * 2 * (experts + projections)

    def config(self) -> MHMoEConfig:
        """Our layer with GELU experts and TorchScale's X-MoE router."""
        return MHMoEConfig(
            embed_dim=self.embed_dim,
            num_heads=self.num_heads,
            num_experts=self.num_experts,
            top_k=self.top_k,
            expert_ffn_dim=self.ffn_dim,
        )

    def swiglu_config(self) -> MHMoEConfig:
        """Our layer as Mixtral's block computes: linear router, SwiGLU, no expert biases."""
        return dataclasses.replace(
            self.config(), router="linear", activation="swiglu", expert_bias=False, expert_ffn_dim=self.swiglu_dim
        )

    def label(self) -> str:
        return f"T={self.tokens} E={self.num_experts} {self.dtype}"
