"""The router of SMEAR (Muqeeth et al., 2023): normalised inputs against normalised expert vectors."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .router import ROUTERS, LinearRouter, Router, RouterFields

_INITIAL_SCALE = 1e-2  # of the expert vectors and of their norm: routing begins close to uniform


class LayerNormRouter(Router):
    """Logits ``LN(x) LN(W)'``, each LayerNorm with a scale and a shift of its own.

    >>> LayerNormRouter(MHMoEConfig(embed_dim=8, num_experts=4, expert_ffn_dim=16))(torch.randn(3, 8)).shape
    torch.Size([3, 4])
    """

    def __init__(self, config: RouterFields) -> None:
        super().__init__(config)
        dim = config.router_input_dim
        self.expert_weight = nn.Parameter(torch.empty(config.num_experts, dim))
        self.input_scale, self.input_shift = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(dim))
        self.expert_scale, self.expert_shift = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    @staticmethod
    def num_params(config: RouterFields) -> int:
        """One vector for each expert, and two norms."""
        return LinearRouter.num_params(config) + 4 * config.router_input_dim

    @staticmethod
    def flops(config: RouterFields) -> int:
        """One product."""
        return LinearRouter.flops(config)

    @staticmethod
    def num_kept(config: RouterFields) -> int:
        """The normalised sub-token, and its norm's mean and deviation."""
        return config.router_input_dim + 2

    def reset_parameters(self) -> None:
        """Small normal expert vectors under a small norm, inputs under the identity."""
        nn.init.normal_(self.expert_weight, std=_INITIAL_SCALE)
        nn.init.ones_(self.input_scale)
        nn.init.zeros_(self.input_shift)
        nn.init.constant_(self.expert_scale, _INITIAL_SCALE)
        nn.init.zeros_(self.expert_shift)

    def scores(self, x_Nd: Tensor) -> Tensor:
        """``LN(x) LN(W)'``."""
        dtype, width = x_Nd.dtype, x_Nd.shape[-1:]
        x_Nd = F.layer_norm(x_Nd, width, self.input_scale.to(dtype), self.input_shift.to(dtype))
        scale, shift = self.expert_scale.to(dtype), self.expert_shift.to(dtype)
        experts_Ed = F.layer_norm(self.expert_weight.to(dtype), width, scale, shift)
        return F.linear(x_Nd, experts_Ed)


ROUTERS["layernorm"] = LayerNormRouter
