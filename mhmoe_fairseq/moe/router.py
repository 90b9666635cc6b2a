"""Routers: from sub-tokens to one logit per expert. They hold parameters and choose nothing.

A new router is a subclass of :class:`Router` in ``ROUTERS``, and the fields it needs in :class:`RouterFields`.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.ranges import POSITIVE
from ._fields import ConfigError, Size, require_fields
from .modes import widened, without_autocast

# TorchScale keeps the expert embeddings at this norm; only the size of a step depends on it,
# since the forward pass normalises them.
_EXPERT_NORM = 1.5
_MIN_TEMPERATURE = 1e-2
_NOT_ITS_TURN = -1e4  # float16 has it, and its exponential is 0
ROUTERS: "dict[str, type[Router]]" = {}


@dataclass(frozen=True, kw_only=True)
class RouterFields:
    """What :class:`MHMoEConfig` says about the router.

    Args:
        router: a name in ``ROUTERS``: ``"xmoe"`` (low-dimensional, normalised experts), ``"linear"``, or for benchmarks
            ``"balanced"``; ``"domain"`` takes its choices from the caller.
        router_dim: width of the X-MoE router's projection.
        router_normalize: ``"expert"`` (TorchScale) or ``"both"`` (a true cosine).
        router_temperature: initial value of a learnable temperature, or None for none.
        gating_fp32: run the router in float32 under mixed precision.

    >>> RouterFields(num_experts=4).router
    'xmoe'
    """

    num_experts: Size
    router: Annotated[str, ROUTERS] = "xmoe"
    router_dim: Size = 16
    router_normalize: Literal["expert", "both"] = "expert"
    router_temperature: Annotated[float | None, POSITIVE] = None
    gating_fp32: bool = True

    @property
    def router_input_dim(self) -> int:
        """Width of what is routed, of sub-tokens d."""
        raise NotImplementedError


class Router(nn.Module):
    """One logit per sub-token and expert; a subclass has ``scores``, ``num_params`` and ``flops``.

    One that learns by itself, too, has ``after_update`` (``updates.py``).

    ``gating_fp32`` routes half-precision inputs in float32 and without autocast: a rounded logit changes which expert
    is chosen, not just by how much.

    Attributes:
        learns: whether the gate's losses teach it; without, they are 0.
        is_fixed: whether its choices do not depend on what is learnt, so that nothing balances them.

    >>> issubclass(ROUTERS["linear"], Router)
    True
    """

    learns = True
    is_fixed = False

    def __init__(self, config: RouterFields) -> None:
        super().__init__()
        self.gating_fp32 = config.gating_fp32

    @classmethod
    def check(cls, config: RouterFields) -> None:
        """Refuse, with a ConfigError, what this router cannot do; by default a field of another router's."""
        rule = f"needs the xmoe router; {{router}} is {config.router!r}"
        require_fields(config, {"router_temperature": None, "router_normalize": "expert"}, rule)

    @staticmethod
    def num_params(config: RouterFields) -> int:
        """How many parameters this router has."""
        raise NotImplementedError

    @staticmethod
    def flops(config: RouterFields) -> int:
        """FLOPs of routing one sub-token, matrix products only (2 per multiply-add)."""
        raise NotImplementedError

    @staticmethod
    def num_kept(config: RouterFields) -> int:
        """How many numbers of a sub-token are kept for the backward pass, beside its features and its logits."""
        raise ConfigError("router", config.router, "does not say how much it keeps for its backward pass")

    def scores(self, x_Nd: Tensor) -> Tensor:
        """The logits, in the dtype of ``x_Nd``: ``(N, d) -> (N, E)``."""
        raise NotImplementedError

    def forward(self, x_Nd: Tensor, domain_N: Tensor | None = None) -> Tensor:
        """``(N, d) -> (N, E)`` logits; ``ConfigError`` where ``domain_N``, each sub-token's, is given in vain."""
        if domain_N is not None:
            raise ConfigError("domain", tuple(domain_N.shape), "is given, but {router} is not 'domain'")
        if not self.gating_fp32:
            return self.scores(x_Nd)
        with without_autocast(x_Nd.device.type):
            return self.scores(widened(x_Nd))


class LinearRouter(Router):
    """GShard's router: logits ``x W^T`` without bias.

    >>> LinearRouter(MHMoEConfig(embed_dim=8, num_experts=4, expert_ffn_dim=16))(torch.randn(3, 8)).shape
    torch.Size([3, 4])
    """

    def __init__(self, config: RouterFields) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.router_input_dim))
        self.reset_parameters()

    @staticmethod
    def num_params(config: RouterFields) -> int:
        """One vector for each expert."""
        return config.router_input_dim * config.num_experts

    @staticmethod
    def flops(config: RouterFields) -> int:
        """One product."""
        return 2 * config.router_input_dim * config.num_experts

    @staticmethod
    def num_kept(config: RouterFields) -> int:
        """Nothing more."""
        return 0

    def reset_parameters(self) -> None:
        """``nn.Linear``'s default."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def scores(self, x_Nd: Tensor) -> Tensor:
        """``x W^T``."""
        return F.linear(x_Nd, self.weight.to(x_Nd.dtype))


class XMoERouter(Router):
    """X-MoE's router: a low-dimensional projection compared with normalised expert embeddings.

    With ``router_normalize="expert"`` the projected sub-token is not normalised and there is no temperature:
    what TorchScale 0.3.0 computes. ``"both"`` with a temperature is the cosine router of the papers.
    The expert embeddings are normalised in the graph; no parameter is edited in forward.

    >>> XMoERouter(MHMoEConfig(embed_dim=8, num_experts=4, expert_ffn_dim=16))(torch.randn(3, 8)).shape
    torch.Size([3, 4])
    """

    def __init__(self, config: RouterFields) -> None:
        super().__init__(config)
        self.normalize_both = config.router_normalize == "both"
        self.reduction = nn.Linear(config.router_input_dim, config.router_dim, bias=False)
        self.expert_embedding = nn.Parameter(torch.empty(config.num_experts, config.router_dim))
        self.initial_temperature = config.router_temperature
        self.temperature = None if config.router_temperature is None else nn.Parameter(torch.empty(()))
        self.reset_parameters()

    @classmethod
    def check(cls, config: RouterFields) -> None:
        """All fields have a meaning here."""

    @staticmethod
    def num_params(config: RouterFields) -> int:
        """The projection, the expert embeddings and the temperature."""
        temperature = config.router_temperature is not None
        return (config.router_input_dim + config.num_experts) * config.router_dim + temperature

    @staticmethod
    def flops(config: RouterFields) -> int:
        """The projection and the product with the expert embeddings."""
        return 2 * (config.router_input_dim + config.num_experts) * config.router_dim

    @staticmethod
    def num_kept(config: RouterFields) -> int:
        """The projection, before and after it is normalised."""
        return config.router_dim * (2 if config.router_normalize == "both" else 1)

    def reset_parameters(self) -> None:
        """Orthogonal expert embeddings of equal norm, the temperature's initial value; the reduction has its own."""
        with torch.no_grad():
            nn.init.orthogonal_(self.expert_embedding)
            self.expert_embedding.copy_(F.normalize(self.expert_embedding, dim=1) * _EXPERT_NORM)
            if self.temperature is not None and self.initial_temperature is not None:
                self.temperature.fill_(self.initial_temperature)

    def scores(self, x_Nd: Tensor) -> Tensor:
        """Dot products, or cosines divided by the temperature."""
        dtype = x_Nd.dtype
        x_Nr = F.linear(x_Nd, self.reduction.weight.to(dtype))
        if self.normalize_both:
            x_Nr = F.normalize(x_Nr, dim=1, eps=1e-4)
        experts_Er = F.normalize(self.expert_embedding.to(dtype), dim=1, eps=1e-4)
        logits_NE = F.linear(x_Nr, experts_Er)
        if self.temperature is not None:
            logits_NE = logits_NE / self.temperature.to(dtype).clamp(min=_MIN_TEMPERATURE)
        return logits_NE


class BalancedRouter(LinearRouter):
    """Sends sub-tokens to experts by turns, whatever they hold: equal loads, for measuring speed.

    Sub-token n of a call gets the experts nK to nK + K - 1, modulo E; their gate weights, and nothing else, come from
    the linear logits.

    >>> config = MHMoEConfig(embed_dim=8, num_experts=4, expert_ffn_dim=16, router="balanced")
    >>> MHMoELayer(config)(torch.randn(6, 8)).stats.expert_load
    tensor([3., 3., 3., 3.])
    """

    is_fixed = True

    def __init__(self, config: Any) -> None:  # an MHMoEConfig: a router has no top_k among its own fields
        super().__init__(config)
        self.top_k = config.top_k

    def scores(self, x_Nd: Tensor) -> Tensor:
        """``x W^T`` for the experts whose turn it is, far below it for the others."""
        logits_NE = super().scores(x_Nd)
        experts, device = logits_NE.size(1), logits_NE.device
        starts_N1 = torch.arange(logits_NE.size(0), device=device).unsqueeze(1) * self.top_k
        turns_NE = (torch.arange(experts, device=device) - starts_N1) % experts
        return logits_NE + (turns_NE >= self.top_k) * _NOT_ITS_TURN


class DomainRouter(Router):
    """DEMix (Gururangan et al., arXiv 2108.05036): an expert for each domain, which the caller names; no parameters.

    The logits leave one choice, so that its gate weight is exactly 1; no gradient reaches another domain's expert.

    >>> config = MHMoEConfig(embed_dim=8, num_experts=3, expert_ffn_dim=16, router="domain", top_k=1)
    >>> MHMoELayer(config)(torch.randn(2, 8), domain=torch.tensor([2, 0])).stats.expert_load
    tensor([1., 0., 1.])
    """

    learns = False
    is_fixed = True

    def __init__(self, config: RouterFields) -> None:
        super().__init__(config)
        self.num_experts = config.num_experts

    @classmethod
    def check(cls, config: Any) -> None:  # an MHMoEConfig, of more fields than a router's own
        """Nothing that would divide a token, weigh its expert otherwise or refuse it: all of it goes to its domain."""
        super().check(config)
        needed = {"num_heads": 1, "top_k": 1, "routing": "dropless", "gate_score": "softmax", "gate_scale": 1}
        for field, value in needed.items():
            rule = f"must be {value}: all of a token goes to its domain's expert, with weight 1"
            require_fields(config, {field: value}, rule)

    @staticmethod
    def num_params(config: RouterFields) -> int:
        """None."""
        return 0

    @staticmethod
    def flops(config: RouterFields) -> int:
        """No product."""
        return 0

    @staticmethod
    def num_kept(config: RouterFields) -> int:
        """Nothing."""
        return 0

    def forward(self, x_Nd: Tensor, domain_N: Tensor | None = None) -> Tensor:
        """``(N, d), (N,) -> (N, E)``; ``ConfigError`` without domains."""
        if domain_N is None:
            raise ConfigError("domain", None, "must be given: the expert of every token is its domain's")
        logits_NE = x_Nd.new_full((x_Nd.size(0), self.num_experts), _NOT_ITS_TURN)
        return logits_NE.scatter(1, domain_N.unsqueeze(1), 0.0)


ROUTERS.update(linear=LinearRouter, xmoe=XMoERouter, balanced=BalancedRouter, domain=DomainRouter)
