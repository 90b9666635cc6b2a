"""Group-limited routing: the best groups of experts first, then the best experts of these (DeepSeek-V2 and V3)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ._fields import ConfigError, Size

_BEST = {"max": 1, "top2": 2}  # of a group's experts count for it


@dataclass(frozen=True, kw_only=True)
class GroupFields:
    """What :class:`MHMoEConfig` says about groups of experts.

    Args:
        expert_groups: equal groups of consecutive experts; 1 for no groups.
        kept_groups: groups that a sub-token may choose from.
        group_score: a group's is the largest score in it (``"max"``, DeepSeek-V2), or the sum of its two largest
            (``"top2"``, DeepSeek-V3); with a selection bias, of the biased scores.

    >>> GroupFields(num_experts=8, expert_groups=4, kept_groups=2).check_groups()
    """

    num_experts: Size
    top_k: Size = 2
    expert_groups: Size = 1
    kept_groups: Size = 1
    group_score: Literal["max", "top2"] = "max"

    def check_groups(self) -> None:
        """Refuse fields that contradict each other."""
        if self.num_experts % self.expert_groups:
            rule = f"must divide {{num_experts}} ({self.num_experts})"
            raise ConfigError("expert_groups", self.expert_groups, rule)
        if self.kept_groups > self.expert_groups:
            rule = f"must be at most {{expert_groups}} ({self.expert_groups})"
            raise ConfigError("kept_groups", self.kept_groups, rule)
        size = self.num_experts // self.expert_groups
        if self.top_k > self.kept_groups * size:
            rule = f"must be at most the {self.kept_groups * size} experts of {{kept_groups}} ({self.kept_groups})"
            raise ConfigError("top_k", self.top_k, rule)
        if size < _BEST[self.group_score] or (self.group_score != "max" and self.expert_groups == 1):
            rule = f"needs groups of two experts or more; {{expert_groups}} ({self.expert_groups}) have {size} each"
            raise ConfigError("group_score", self.group_score, rule)


def outside_kept_groups(scores_NE: Tensor, config: GroupFields) -> Tensor:
    """Which experts a sub-token may not choose, bool ``(N, E)``; of equal groups the first is kept.

    >>> config = GroupFields(num_experts=4, expert_groups=2, top_k=1)
    >>> outside_kept_groups(torch.tensor([[0.1, 0.2, 0.4, 0.0]]), config)
    tensor([[ True,  True, False, False]])
    """
    scores_NGe = scores_NE.detach().unflatten(1, (config.expert_groups, -1))
    of_group_NG = scores_NGe.topk(_BEST[config.group_score], dim=2).values.sum(2)
    kept = of_group_NG.argsort(dim=1, descending=True, stable=True)[:, : config.kept_groups]
    outside_NG = torch.ones_like(of_group_NG, dtype=torch.bool).scatter(1, kept, False)
    return outside_NG.repeat_interleave(scores_NGe.size(2), dim=1)
