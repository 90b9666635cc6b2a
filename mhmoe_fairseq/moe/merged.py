"""Merged experts: not tokens are sent to experts, the experts' weights are averaged, and tokens pass the average.

G is the number of groups of tokens that share one merged network: examples (SMEAR), or segments (:mod:`.lory`).
A new way to merge is a subclass of :class:`MergedLayer` in ``MERGINGS``.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import layernorm_router  # noqa: F401  (registered)
from ._expert_network import ExpertWeights, expert_network
from ._fields import ConfigError, Size
from .config import MHMoEConfig
from .experts import ExpertFFN
from .layer import ExpertLayer, MHMoEOutput
from .modes import compute_dtype, widened, without_autocast
from .router import ROUTERS
from .stats import RoutingStats

MERGINGS: "dict[str, type[MergedLayer]]" = {}

# Fields that have a meaning here, and those of projections, of which there are none; all others keep their defaults.
_POSSIBLE = frozenset("""
    embed_dim expert_ffn_dim num_experts activation expert_bias expert_layernorm activation_dropout dropout routing
    router router_dim router_normalize router_temperature gating_fp32 segment_length
    projection_bias projection_gain num_projection_layers
""".split())  # fmt: skip
_MERGED_GATES = 1e-10  # SMEAR's: where all experts are dropped, all count alike


@dataclass(frozen=True, kw_only=True)
class MergedConfig(MHMoEConfig):
    """A layer of merged experts; a token passes one network, ``top_k`` 1, in which all experts' parameters are active.

    Args:
        routing: a name in ``MERGINGS``.
        segment_length: tokens that share one merged network. Of SMEAR, which merges for each whole example, as many as
            its FLOPs are counted for.

    >>> config = MergedConfig(embed_dim=64, num_experts=8, expert_ffn_dim=256, router="linear", segment_length=32)
    >>> config.num_params() == config.num_active_params(), config.flops_per_token()
    (True, 82112)
    """

    routing: Annotated[str, MERGINGS] = "lory"
    top_k: Size = 1
    segment_length: Size = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in _POSSIBLE and value != field.default:
                raise ConfigError(
                    field.name,
                    value,
                    f"cannot be combined with {{routing}} {self.routing}: whole tokens pass one network, averaged over "
                    "all experts, and no expert is chosen or shared out",
                )

    def num_router_params(self) -> int:
        """Parameters of the router, and what the way of merging has beside it."""
        return super().num_router_params() + MERGINGS[self.routing].num_own_params(self)

    def num_active_params(self) -> int:
        """All: the merged network is made of all experts."""
        return self.num_params()

    def flops_per_token(self) -> int:
        """One expert's FLOPs for each token; routing, and E times an expert's parameters to merge, once a segment."""
        of_token = 2 * self.matrices_per_expert * self.embed_dim * self.expert_ffn_dim
        of_segment = ROUTERS[self.router].flops(self) + 2 * self.num_experts * self.num_expert_params()
        return of_token + round(of_segment / self.segment_length)


class MergedExperts(ExpertFFN):
    """The experts' stacked parameters, of which one network is made for each group of tokens.

    >>> experts = MergedExperts(MergedConfig(embed_dim=8, num_experts=4, expert_ffn_dim=16))
    >>> experts(torch.randn(2, 5, 8), torch.full((2, 4), 0.25)).shape
    torch.Size([2, 5, 8])
    """

    def forward(self, x_GSd: Tensor, probs_GE: Tensor) -> Tensor:  # type: ignore[override]
        """Every group through its own average of the experts, ``(G, S, d), (G, E) -> (G, S, d)``."""
        dtype = compute_dtype(x_GSd)
        with without_autocast(x_GSd.device.type):
            merged = self._merged(probs_GE.to(dtype))
            rate = self.config.activation_dropout
            drop = functools.partial(F.dropout, p=rate, training=self.training and rate > 0)
            return expert_network(
                x_GSd.to(dtype), merged, self.config.activation, drop, _linear, lambda stacked: stacked.unsqueeze(1)
            )

    def _merged(self, probs_GE: Tensor) -> ExpertWeights:
        """All parameters, averaged: with a leading dimension for groups in place of experts."""

        def average(weight: Tensor) -> Tensor:
            return (probs_GE @ weight.to(probs_GE.dtype).flatten(1)).view(-1, *weight.shape[1:])

        return self._weights().each(average)


def _linear(x_GSd: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.bmm(x_GSd, weight.transpose(1, 2))
    return y if bias is None else y + bias.unsqueeze(1)


class MergedLayer(ExpertLayer):
    """Stands in a model where :class:`MHMoELayer` does; without losses, since nothing has to be balanced.

    Its statistics count soft assignments: a token adds its group's routing weights to the experts' loads. All experts
    are active by construction; the effective share tells how evenly.

    Attributes:
        drops_tokens: as of ``MHMoELayer``.
        sees_later: why positions of a sequence depend on later ones; empty where they do not.

    >>> all(issubclass(merging, MergedLayer) for merging in MERGINGS.values())
    True
    """

    drops_tokens = False
    sees_later: ClassVar[str] = ""
    config: MergedConfig

    def __init__(self, config: MergedConfig) -> None:
        super().__init__(config)
        self.router = ROUTERS[config.router](config)
        self.experts = MergedExperts(config)

    @staticmethod
    def num_own_params(config: MergedConfig) -> int:
        """Parameters beside those of router and experts."""
        return 0

    def extra_repr(self) -> str:
        """The sizes, for ``print(model)``."""
        c = self.config
        sizes = f"experts={c.num_experts}, expert_ffn_dim={c.expert_ffn_dim}"
        return f"{sizes}, routing={c.routing}, params={c.num_params():,}"

    def route(self, means_GD: Tensor) -> Tensor:
        """Logits of groups whose mean tokens these are, in float32 or wider, ``(G, D) -> (G, E)``."""
        return widened(self.router(means_GD))

    def output(self, y: Tensor, probs_GE: Tensor, tokens_G: Tensor) -> MHMoEOutput:
        """What is returned of tokens ``(..., D)`` that passed networks merged by ``probs_GE``.

        Args:
            tokens_G: how many real tokens each group has.
        """
        zero = probs_GE.new_zeros(())
        return MHMoEOutput(
            F.dropout(y, self.config.dropout, self.training), zero, zero, _soft_stats(probs_GE.detach(), tokens_G)
        )


@torch.no_grad()
def _soft_stats(probs_GE: Tensor, tokens_G: Tensor) -> RoutingStats:
    probs_GE, tokens_G1 = probs_GE.float(), tokens_G.float().unsqueeze(1)
    entropy = (torch.special.entr(probs_GE) * tokens_G1).sum()
    return RoutingStats((probs_GE * tokens_G1).sum(0), torch.zeros_like(entropy), entropy, tokens_G1.sum())


class SMEARLayer(MergedLayer):
    """Soft merging of experts with adaptive routing (SMEAR, Muqeeth et al., 2023): one merged network for each example.

    The example is routed by the mean of its real tokens. In training experts are left out at random, each with
    probability 0.1, and the weights of the others scaled to sum to 1.

    >>> config = MergedConfig(embed_dim=8, num_experts=4, expert_ffn_dim=16, routing="smear", router="layernorm")
    >>> SMEARLayer(config)(torch.randn(2, 5, 8)).stats.expert_load.sum()
    tensor(10.)
    """

    expert_dropout: ClassVar[float] = 0.1
    sees_later = "its weights come from the mean of all of a text, in which every position sees what follows it"

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> MHMoEOutput:
        """Apply the layer.

        Args:
            x: ``(B, S, D)``.
            padding_mask: bool ``(B, S)``, True where padded: such tokens enter no mean.
        """
        x, real_BS = real_tokens(x, padding_mask)
        tokens_B = real_BS.sum(1)
        wide = torch.promote_types(x.dtype, torch.float32)
        means_BD = x.sum(1, dtype=wide) / tokens_B.clamp(min=1).unsqueeze(1)
        probs_BE = torch.softmax(self.route(means_BD.to(x.dtype)), dim=1)
        if self.training:
            probs_BE = self._some_left_out(probs_BE)
        return self.output(self.experts(x, probs_BE), probs_BE, tokens_B)

    def _some_left_out(self, probs_BE: Tensor) -> Tensor:
        kept_BE = probs_BE.masked_fill(torch.rand_like(probs_BE) < self.expert_dropout, 0) + _MERGED_GATES
        return kept_BE / kept_BE.sum(1, keepdim=True)


def real_tokens(x: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens ``(B, S, D)`` with zeros where padded, and which of them are real, bool ``(B, S)``.

    >>> real_tokens(torch.ones(1, 2, 1), torch.tensor([[False, True]]))
    (tensor([[[1.],
             [0.]]]), tensor([[ True, False]]))
    """
    if padding_mask is None:
        return x, x.new_ones(x.shape[:2], dtype=torch.bool)
    mask = padding_mask.bool()
    return x.masked_fill(mask.unsqueeze(-1), 0), ~mask  # 0 * NaN is NaN: never multiply by the mask


MERGINGS["smear"] = SMEARLayer
