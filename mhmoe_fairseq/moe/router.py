"""Routers: from sub-tokens to one logit per expert. They hold parameters and choose nothing."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MHMoEConfig

# TorchScale keeps the expert embeddings at this norm; only the size of a step depends on it,
# since the forward pass normalises them.
_EXPERT_NORM = 1.5
_MIN_TEMPERATURE = 1e-2


class LinearRouter(nn.Module):
    """GShard's router: logits ``x W^T`` without bias."""

    def __init__(self, config: MHMoEConfig) -> None:
        super().__init__()
        self.gating_fp32 = config.gating_fp32
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.subtoken_dim))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x_Nd: Tensor) -> Tensor:
        """``(N, d) -> (N, E)`` logits."""
        with gating_precision(x_Nd, self.gating_fp32) as dtype:
            return F.linear(x_Nd.to(dtype), self.weight.to(dtype))


class XMoERouter(nn.Module):
    """X-MoE's router: a low-dimensional projection compared with normalised expert embeddings.

    With ``router_normalize="expert"`` the projected sub-token is not normalised and there is no temperature:
    what TorchScale 0.3.0 computes. ``"both"`` with a temperature is the cosine router of the papers.
    The expert embeddings are normalised in the graph; no parameter is edited in forward.
    """

    def __init__(self, config: MHMoEConfig) -> None:
        super().__init__()
        self.gating_fp32 = config.gating_fp32
        self.normalize_both = config.router_normalize == "both"
        self.reduction = nn.Linear(config.subtoken_dim, config.router_dim, bias=False)
        embedding = torch.empty(config.num_experts, config.router_dim)
        nn.init.orthogonal_(embedding)
        self.expert_embedding = nn.Parameter(F.normalize(embedding, dim=1) * _EXPERT_NORM)
        self.temperature: nn.Parameter | None = None
        if config.router_temperature is not None:
            self.temperature = nn.Parameter(torch.tensor(float(config.router_temperature)))

    def forward(self, x_Nd: Tensor) -> Tensor:
        """``(N, d) -> (N, E)`` logits."""
        with gating_precision(x_Nd, self.gating_fp32) as dtype:
            x_Nr = F.linear(x_Nd.to(dtype), self.reduction.weight.to(dtype))
            if self.normalize_both:
                x_Nr = F.normalize(x_Nr, dim=1, eps=1e-4)
            experts_Er = F.normalize(self.expert_embedding.to(dtype), dim=1, eps=1e-4)
            logits_NE = F.linear(x_Nr, experts_Er)
            if self.temperature is not None:
                logits_NE = logits_NE / self.temperature.to(dtype).clamp(min=_MIN_TEMPERATURE)
            return logits_NE


class gating_precision:
    """Context in which the router computes; yields the dtype to compute in.

    With ``fp32`` half-precision inputs are routed in float32 and autocast is off: a rounded logit
    changes which expert is chosen, not just by how much.
    """

    def __init__(self, x: Tensor, fp32: bool) -> None:
        half = x.dtype in (torch.float16, torch.bfloat16)
        self.dtype = torch.float32 if fp32 and half else x.dtype
        self.context = torch.autocast(x.device.type, enabled=False) if fp32 and x.device.type != "meta" else None

    def __enter__(self) -> torch.dtype:
        if self.context is not None:
            self.context.__enter__()
        return self.dtype

    def __exit__(self, *error: object) -> None:
        if self.context is not None:
            self.context.__exit__(*error)


def build_router(config: MHMoEConfig) -> LinearRouter | XMoERouter:
    """The router that ``config.router`` names."""
    return LinearRouter(config) if config.router == "linear" else XMoERouter(config)
