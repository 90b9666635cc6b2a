"""Routers: from sub-tokens to one logit per expert. They hold parameters and choose nothing."""

from __future__ import annotations

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._modes import without_autocast
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
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """``nn.Linear``'s default."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x_Nd: Tensor) -> Tensor:
        """``(N, d) -> (N, E)`` logits."""
        dtype = gating_dtype(x_Nd, self.gating_fp32)
        with gating_context(x_Nd, self.gating_fp32):
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
        self.expert_embedding = nn.Parameter(torch.empty(config.num_experts, config.router_dim))
        self.initial_temperature = config.router_temperature
        self.temperature = None if config.router_temperature is None else nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Orthogonal expert embeddings of equal norm, the temperature's initial value; the reduction has its own."""
        with torch.no_grad():
            nn.init.orthogonal_(self.expert_embedding)
            self.expert_embedding.copy_(F.normalize(self.expert_embedding, dim=1) * _EXPERT_NORM)
            if self.temperature is not None and self.initial_temperature is not None:
                self.temperature.fill_(self.initial_temperature)

    def forward(self, x_Nd: Tensor) -> Tensor:
        """``(N, d) -> (N, E)`` logits."""
        dtype = gating_dtype(x_Nd, self.gating_fp32)
        with gating_context(x_Nd, self.gating_fp32):
            x_Nr = F.linear(x_Nd.to(dtype), self.reduction.weight.to(dtype))
            if self.normalize_both:
                x_Nr = F.normalize(x_Nr, dim=1, eps=1e-4)
            experts_Er = F.normalize(self.expert_embedding.to(dtype), dim=1, eps=1e-4)
            logits_NE = F.linear(x_Nr, experts_Er)
            if self.temperature is not None:
                logits_NE = logits_NE / self.temperature.to(dtype).clamp(min=_MIN_TEMPERATURE)
            return logits_NE


def gating_dtype(x: Tensor, fp32: bool) -> torch.dtype:
    """The type that the router computes in: with ``fp32`` half-precision inputs are routed in float32.

    A rounded logit changes which expert is chosen, not just by how much.
    """
    half = x.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if fp32 and half else x.dtype


def gating_context(x: Tensor, fp32: bool) -> contextlib.AbstractContextManager[object]:
    """The context that it computes in: without autocast if ``fp32``, else as the caller has it."""
    return without_autocast(x.device.type) if fp32 else contextlib.nullcontext()


def build_router(config: MHMoEConfig) -> LinearRouter | XMoERouter:
    """The router that ``config.router`` names."""
    return LinearRouter(config) if config.router == "linear" else XMoERouter(config)
