"""Heads with a router and a bank of experts of their own (Multi-Head LatentMoE, arXiv 2602.04870, section 3).

The rows of a batch are sub-tokens, H consecutive ones of each token: row n is of head, and bank, n % H. A router sees
its head's rows and numbers its bank's experts from 0. Behind the gate experts are counted through all banks, expert e
of head h being number h*E + e, so that one dispatch and one stack of experts serve all heads.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from ._fields import ConfigError
from .router import ROUTERS, Router
from .updates import ActsAfterUpdate


class HeadRouters(nn.ModuleList):
    """A router for each head.

    >>> config = MHMoEConfig(embed_dim=8, num_heads=2, num_experts=4, expert_ffn_dim=16, expert_banks="per-head")
    >>> HeadRouters(config)(torch.randn(6, 4)).shape  # sub-tokens of 3 tokens
    torch.Size([6, 4])
    """

    def __init__(self, config: Any) -> None:  # an MHMoEConfig, whose module needs the gate's, which needs this one
        super().__init__(ROUTERS[config.router](config) for _ in range(config.num_banks))
        if isinstance(self[0], ActsAfterUpdate):  # which is told of all banks together
            raise ConfigError("router", config.router, "learns from loads of one bank; {expert_banks} has several")

    def forward(self, x_Nd: Tensor, domain_N: Tensor | None = None) -> Tensor:
        """``(N, d) -> (N, E)`` logits, each row's by its head's router; a domain is one head's, never given here."""
        return self.of_heads(range(len(self)), x_Nd)

    def of_heads(self, heads: range, x_Nd: Tensor) -> Tensor:
        """The same of sub-tokens that are of these heads alone."""
        by_head = x_Nd.view(-1, len(heads), x_Nd.size(1)).unbind(1)
        logits = [self[head](x_Td) for head, x_Td in zip(heads, by_head)]
        return torch.stack(logits, dim=1).flatten(0, 1)

    @property
    def learns(self) -> bool:
        """Whether the gate's losses teach the routers."""
        return cast(Router, self[0]).learns


def build_router(config: Any) -> nn.Module:
    """The router that ``config``, an :class:`MHMoEConfig`, describes, or one for each head.

    >>> build_router(MHMoEConfig(embed_dim=8, num_heads=2, num_experts=4, expert_ffn_dim=16, router="linear"))
    LinearRouter()
    """
    return HeadRouters(config) if config.num_banks > 1 else ROUTERS[config.router](config)


def of_all_banks(experts_NK: Tensor, num_banks: int, num_experts: int) -> Tensor:
    """Numbers of experts through all banks, where each row's were counted in its own.

    >>> of_all_banks(torch.tensor([[0, 2], [0, 2]]), num_banks=2, num_experts=3).tolist()
    [[0, 2], [3, 5]]
    """
    if num_banks == 1:
        return experts_NK
    heads_N = torch.arange(experts_NK.size(0), device=experts_NK.device) % num_banks
    return experts_NK + (heads_N * num_experts).unsqueeze(1)
