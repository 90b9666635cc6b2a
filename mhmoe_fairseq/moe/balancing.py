"""Balancing without a loss: a bias of each expert that decides which are chosen, and never what they weigh.

It is added to the experts' scores and moves after each update, by rules that know loads of the past only: what one
sub-token is routed by must not depend on the others of its batch. A new rule is a subclass of :class:`SelectionBias` in
``BALANCINGS``. Sources: Loss-Free Balancing (arXiv 2408.15664, section 3 and table 3), DeepSeek-V3 (arXiv 2412.19437,
section 2.1.2), Quantile Balancing (kexue.fm/archives/11619).
"""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.ranges import POSITIVE
from ._fields import ConfigError, Size
from .updates import ExactState, UpdateSums

BALANCINGS: "dict[str, type[SelectionBias] | None]" = {"none": None}


@dataclass(frozen=True, kw_only=True)
class BalancingFields:
    """What :class:`MHMoEConfig` says about balancing without a loss.

    Args:
        balancing: a name in ``BALANCINGS``: ``"none"``, ``"bias-sign"``, ``"bias-proportional"`` or ``"quantile"``.
        balancing_rate: how far the bias moves; None for the rule's own.

    >>> BalancingFields(num_experts=4).balancing
    'none'
    """

    num_experts: Size
    top_k: Size = 2
    balancing: Annotated[str, BALANCINGS] = "none"
    balancing_rate: Annotated[float | None, POSITIVE] = None

    @property
    def num_banks(self) -> int:
        """Banks of ``num_experts`` experts, of which consecutive sub-tokens use one after the other."""
        return 1

    def check_balancing(self) -> None:
        """Refuse fields that contradict each other."""
        if self.balancing == "none" and self.balancing_rate is not None:
            raise ConfigError("balancing_rate", self.balancing_rate, "needs a {balancing}, which is none")
        if self.balancing != "none" and self.top_k == self.num_experts:
            rule = f"has nothing to balance: {{top_k}} is {{num_experts}} ({self.num_experts}), all are always chosen"
            raise ConfigError("balancing", self.balancing, rule)


class SelectionBias(ExactState):
    """A bias of each expert, in float32 or wider whatever the layer's dtype; a subclass has ``step``.

    Attributes:
        bias: ``(banks, E)``, a buffer.
        own: the banks that are chosen from here, others elsewhere: see :meth:`extend`.
        default_rate: how far the bias moves unless ``balancing_rate`` says otherwise.

    >>> SelectionBias(BalancingFields(num_experts=2, balancing="bias-sign"))(torch.tensor([[0.5, 0.3]]))
    tensor([[0.5000, 0.3000]])
    """

    bias: Tensor
    default_rate = 0.001

    def __init__(self, config: BalancingFields) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.rate = self.default_rate if config.balancing_rate is None else config.balancing_rate
        self.own = range(config.num_banks)
        self.register_buffer("bias", torch.zeros(config.num_banks, config.num_experts))

    def extend(self, config: BalancingFields, first: int) -> None:
        """Be the bias of all banks of ``config``, of which as many as before, from ``first`` on, are chosen from here.

        So every process has, and moves, what a checkpoint holds.
        """
        self.own = range(first, first + len(self.own))
        self.register_buffer("bias", self.bias.new_zeros(config.num_banks, config.num_experts))

    def reset_parameters(self) -> None:
        """No bias."""
        self.bias.zero_()

    def forward(self, scores_NE: Tensor) -> Tensor:
        """What experts are chosen by, ``(N, E)``; without gradient."""
        bias = self.bias[self.own.start : self.own.stop]
        return (scores_NE.detach().view(-1, *bias.shape) + bias).view_as(scores_NE)

    def evidence(self, biased_NE: Tensor, padding_mask_N: Tensor | None) -> Tensor | None:
        """Counts of one batch, beside the experts' loads, that ``step`` needs the sum of; None for none.

        Of all banks, zero in those that others choose from.
        """
        return None

    def step(self, sums: UpdateSums) -> Tensor:
        """How the bias moves, at a rate of 1: ``(banks, E)``."""
        raise NotImplementedError

    def after_update(self, sums: UpdateSums) -> None:
        """Move the bias; its mean stays 0, which changes no choice and keeps it bounded."""
        step = self.step(sums)
        self.bias += self.rate * (step - step.mean(1, keepdim=True))

    def _loads(self, sums: UpdateSums) -> Tensor:
        return sums.stats.expert_load.view_as(self.bias)


class SignBias(SelectionBias):
    """A fixed step up below the mean load, and down above it: ``b += rate * sign(mean - load)``.

    >>> rule = SignBias(BalancingFields(num_experts=4, balancing="bias-sign"))
    >>> rule.step(UpdateSums(RoutingStats(torch.tensor([3.0, 1.0, 0.0, 4.0]), *torch.zeros(3)), None))
    tensor([[-1.,  1.,  1., -1.]])
    """

    def step(self, sums: UpdateSums) -> Tensor:
        """The sign of what is missing."""
        loads = self._loads(sums)
        return (loads.mean(1, keepdim=True) - loads).sign()


class ProportionalBias(SelectionBias):
    """A step in proportion to what is missing, relative to the mean load, so that it does not depend on the batch.

    >>> rule = ProportionalBias(BalancingFields(num_experts=4, balancing="bias-proportional"))
    >>> rule.step(UpdateSums(RoutingStats(torch.tensor([3.0, 1.0, 0.0, 4.0]), *torch.zeros(3)), None))
    tensor([[-0.5000,  0.5000,  1.0000, -1.0000]])
    """

    def step(self, sums: UpdateSums) -> Tensor:
        """``(mean - load) / mean``."""
        loads = self._loads(sums)
        mean = loads.mean(1, keepdim=True)
        return (mean - loads) / mean.clamp(min=torch.finfo(loads.dtype).tiny)


class QuantileBalancing(SelectionBias):
    """Lowers each bias by that margin which just its share of the sub-tokens exceeds.

    The margin of expert j for sub-token i is its biased score less the (K + 1)-th largest of i: above 0 where j is
    chosen. Of N sub-tokens each expert should get q = K N / E; the (q + 1)-th largest margin of j, subtracted from its
    bias, leaves it q, as long as the others stay where they are. N are those of the expert's bank.

    A quantile of several batches is none of their quantiles. What adds up are counts: of the margins by size, in
    intervals that grow in proportion to their distance from 0, ``(banks, E, intervals)``. The rank is exact; of the
    margin at that rank the sign is exact, and its size within 3 %, or 1e-6. Sub-tokens of all batches of an update are
    ranked by margins under the bias that they were routed by, as if they were one batch.

    >>> rule = QuantileBalancing(BalancingFields(num_experts=2, top_k=1, balancing="quantile"))
    >>> rule.evidence(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), None).sum(-1)
    tensor([[2, 2]])
    """

    default_rate = 1.0

    def evidence(self, biased_NE: Tensor, padding_mask_N: Tensor | None) -> Tensor:
        """How many margins of each expert lie in each interval."""
        last_N1 = biased_NE.topk(self.top_k + 1, dim=1).values[:, -1:]
        bounds = self._bounds(biased_NE)
        index_NE, intervals = torch.bucketize(biased_NE - last_N1, bounds), len(bounds) + 1
        banks, experts = len(self.own), biased_NE.size(1)
        starts_BE = torch.arange(banks * experts, device=index_NE.device).view(banks, experts) * intervals
        index_NE = index_NE.view(-1, banks, experts) + starts_BE
        real_N = index_NE.new_ones(len(biased_NE)) if padding_mask_N is None else (~padding_mask_N).to(index_NE.dtype)
        counts = index_NE.new_zeros(banks * experts * intervals)
        counts.index_add_(0, index_NE.flatten(), real_N.unsqueeze(1).expand_as(biased_NE).reshape(-1))
        others = (0, 0, 0, 0, self.own.start, len(self.bias) - self.own.stop)
        return F.pad(counts.view(banks, experts, intervals), others)

    def step(self, sums: UpdateSums) -> Tensor:
        """Less the margin of rank q + 1, taken from the middle of its interval; 0 without sub-tokens."""
        counts = sums.evidence
        assert counts is not None, "a layer in training counts margins"
        bounds = self._bounds(self.bias)
        middles = torch.cat([bounds[:1], (bounds[1:] + bounds[:-1]) / 2, bounds[-1:]])
        from_top = counts.flip(-1).cumsum(-1)
        total = from_top[..., -1:]
        before = (from_top <= total * self.top_k / self.bias.size(1)).sum(-1)  # intervals that all lie above the rank
        margin = middles.flip(0)[before.clamp(max=len(middles) - 1)]
        return -margin * (total.squeeze(-1) > 0)

    @staticmethod
    def _bounds(like: Tensor) -> Tensor:
        """Of the intervals, in ascending order."""
        sizes = torch.logspace(-6, 1, 280, dtype=like.dtype, device=like.device)
        return torch.cat([-sizes.flip(0), sizes])


BALANCINGS.update({"bias-sign": SignBias, "bias-proportional": ProportionalBias, "quantile": QuantileBalancing})
