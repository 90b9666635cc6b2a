"""ReMoE (Wang et al., ICLR 2025, arXiv 2412.14711): every expert whose logit is positive, as many as there are."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._fields import require_fields
from .assignment import Assignment
from .gate import GATES, Gate, GateFields
from .modes import widened
from .updates import ExactState, UpdateSums

_FIRST_WEIGHT = 1e-8
_FACTOR = 1.2
_BOUNDS = 1e-20, 1e3  # far from where float32 ends, and from what regulates


class AdaptiveWeight(ExactState):
    """The weight of ReMoE's regulariser: it grows while more than K / E of the experts are used, else shrinks.

    One for the whole model: every layer has the same, since each is told of all layers.

    Attributes:
        weight: a buffer, float32 or wider whatever the layer's dtype: float16 has no 1e-8.

    >>> AdaptiveWeight(GateFields(num_experts=4)).weight
    tensor(1.0000e-08)
    """

    weight: Tensor

    def __init__(self, config: GateFields) -> None:
        super().__init__()
        self.num_experts, self.target = config.num_experts, config.top_k / config.num_experts
        self.register_buffer("weight", torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The paper's first value."""
        self.weight.fill_(_FIRST_WEIGHT)

    def after_updates(self, layers: Sequence[UpdateSums]) -> None:
        """Multiply by 1.2, or divide, by the share of experts used of all layers together; without sub-tokens nothing.

        Of a sub-token each could be used that its bank has. The weight stays where it can come back from.
        """
        used, possible = (sum(of) for of in zip(*(self._used_and_possible(sums) for sums in layers)))
        grows = used > self.target * possible
        factor = torch.where(grows, _FACTOR, 1 / _FACTOR)
        self.weight.mul_(torch.where(possible > 0, factor, 1.0)).clamp_(*_BOUNDS)

    def _used_and_possible(self, sums: UpdateSums) -> tuple[Tensor, Tensor]:
        return sums.stats.expert_load.sum(), sums.stats.num_subtokens * self.num_experts


class ReLUGate(Gate):
    """Experts with a positive logit, weighted by it: neither normalised nor a fixed number of them.

    K is how many there should be on average. What leads there is an L1 loss on the weights, by expert times its load
    (equations 8 to 11): ``weight * E * sum_i (sum_t g_ti / N) (count_i / (N K))``, which the layer returns as its
    balance loss. A sub-token without a positive logit gets 0 from the experts.

    >>> gate = ReLUGate(GateFields(num_experts=3, top_k=1, routing="relu"))
    >>> gate(torch.tensor([[-1.0, 0.5, 2.0]])).experts_NK, gate(torch.tensor([[-1.0, 0.5, 2.0]])).gates_NK
    (tensor([[2, 1, 3]]), tensor([[2.0000, 0.5000, 0.0000]]))
    """

    chooses_all = True

    def __init__(self, config: GateFields) -> None:
        super().__init__(config)
        self.adaptive = AdaptiveWeight(config)

    @classmethod
    def check(cls, config: GateFields) -> None:
        """Refuse what is about choosing a fixed number."""
        rule = f"contradicts {{routing}} {config.routing}, by which logits choose and weigh experts"
        require_fields(config, {"gate_score": "softmax", "balancing": "none", "second_expert_policy": "all"}, rule)

    def forward(
        self, logits_NE: Tensor, padding_mask_N: Tensor | None = None, noise: Tensor | None = None
    ) -> Assignment:
        """As the base's; of each sub-token all experts, those with the largest logits first."""
        weights_NE = widened(logits_NE).relu()
        used_NE = weights_NE > 0
        if padding_mask_N is not None:
            used_NE = used_NE & ~padding_mask_N.unsqueeze(1)
        experts_NE, gates_NE, choices_NE, kept_NE = self._by_weight(weights_NE, used_NE)
        probs_NE = weights_NE / weights_NE.sum(1, keepdim=True).clamp(min=torch.finfo(weights_NE.dtype).tiny)
        regulated = used_NE.to(weights_NE.dtype) / self.config.top_k, self.adaptive.weight * weights_NE
        return Assignment(probs_NE, experts_NE, gates_NE, choices_NE, kept_NE, None, regulated=regulated)


GATES["relu"] = ReLUGate
