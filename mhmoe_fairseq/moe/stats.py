"""What the router did: additive counts per batch, and the figures derived from their sums."""

from typing import NamedTuple

import torch
from torch import Tensor

from .assignment import Assignment
from .dispatch import DispatchPlan


class RoutingStats(NamedTuple):
    """Detached counts of one layer; summing them over batches gives those of the whole set.

    A layer with several pools of experts has a leading dimension for them in every count.

    Attributes:
        expert_load: ``(E,)`` float32, assignments (sub-token, choice) per expert of all banks before dropping.
        dropped: scalar, assignments dropped for lack of capacity.
        entropy: scalar, the entropy in nats of the experts' probabilities, summed over real sub-tokens.
        num_subtokens: scalar, real (not padded) sub-tokens.

    >>> stats = RoutingStats(torch.tensor([3.0, 1.0]), *torch.tensor([1.0, 2.0, 4.0]))
    >>> stats.by_pool().expert_load.shape, overflow(stats)
    (torch.Size([1, 2]), tensor(0.2500))
    """

    expert_load: Tensor
    dropped: Tensor
    entropy: Tensor
    num_subtokens: Tensor

    def by_pool(self) -> "RoutingStats":
        """With the leading dimension of pools in any case: ``(pools, E)`` and ``(pools,)``."""
        load = self.expert_load
        return RoutingStats(load.reshape(-1, load.size(-1)), *(count.reshape(-1) for count in self[1:]))


def routing_stats(assignment: Assignment, plan: DispatchPlan, padding_mask_N: Tensor | None) -> RoutingStats:
    """Counts of one forward pass, without graph and without host synchronisation.

    >>> gate, logits = Gate(MHMoEConfig(embed_dim=8, num_experts=2, expert_ffn_dim=16, top_k=1)), torch.eye(2)
    >>> plan = plan_dispatch(gate(logits).experts_NK, 2, all_real=True)
    >>> routing_stats(gate(logits), plan, None).expert_load
    tensor([1., 1.])
    """
    with torch.no_grad():
        entropy_N = torch.special.entr(assignment.probs_NE.detach().float()).sum(1)
        if padding_mask_N is None:
            num_subtokens = entropy_N.new_full((), entropy_N.size(0))
        else:
            entropy_N = entropy_N.masked_fill(padding_mask_N, 0)
            num_subtokens = (~padding_mask_N).sum().float()
        load_E, dropped = plan.load().float(), entropy_N.new_zeros(())
        if assignment.dropped_NK is not None:
            dropped = assignment.dropped_NK.sum().float()
            load_E = load_E.index_add(0, assignment.choices_NK.reshape(-1), assignment.dropped_NK.reshape(-1).float())
        return RoutingStats(load_E, dropped, entropy_N.sum(), num_subtokens)


def head_loads(assignment: Assignment, num_heads: int, num_experts: int) -> Tensor:
    """Counts each head's assignments to each expert before dropping, ``(H, E)`` float64, without host synchronisation.

    Summed over heads they are :class:`RoutingStats`' ``expert_load``.

    >>> gate = Gate(MHMoEConfig(embed_dim=8, num_experts=2, expert_ffn_dim=16, top_k=1))
    >>> head_loads(gate(torch.eye(2).repeat(3, 1)), num_heads=2, num_experts=2).tolist()  # sub-tokens of 3 tokens
    [[3.0, 0.0], [0.0, 3.0]]
    """
    experts_NK = assignment.experts_NK
    heads_N = torch.arange(experts_NK.size(0), device=experts_NK.device) % num_heads
    starts_N1 = (heads_N * (num_experts + 1)).unsqueeze(1)  # a column more for the virtual expert
    counts = torch.zeros(num_heads * (num_experts + 1), dtype=torch.float64, device=experts_NK.device)
    index_R = (experts_NK + starts_N1).flatten()
    counts.index_add_(0, index_R, counts.new_ones(()).expand(index_R.size(0)))
    if assignment.dropped_NK is not None:
        counts.index_add_(0, (assignment.choices_NK + starts_N1).flatten(), assignment.dropped_NK.flatten().double())
    return counts.view(num_heads, num_experts + 1)[:, :num_experts]


def active_share(load_E: Tensor, threshold: float = 0.01) -> Tensor:
    """Share of experts with at least ``threshold`` of the uniform load; over dim -1.

    >>> active_share(torch.tensor([500.0, 500.0, 1.0, 0.0]))
    tensor(0.5000)
    """
    uniform = load_E.sum(-1, keepdim=True) / load_E.size(-1)
    return ((load_E >= threshold * uniform) & (load_E > 0)).float().mean(-1)


def effective_share(load_E: Tensor) -> Tensor:
    """``exp(entropy of the load) / E``: 1 when uniform, 1/E when one expert does everything.

    >>> effective_share(torch.tensor([1.0, 1.0])), effective_share(torch.tensor([2.0, 0.0]))
    (tensor(1.), tensor(0.5000))
    """
    share = load_E / load_E.sum(-1, keepdim=True).clamp(min=1)
    return torch.special.entr(share).sum(-1).exp() / load_E.size(-1)


def load_max_over_mean(load_E: Tensor) -> Tensor:
    """Largest load over mean load: 1 when balanced, E when one expert does everything.

    >>> load_max_over_mean(torch.tensor([3.0, 1.0]))
    tensor(1.5000)
    """
    return load_E.max(-1).values / load_E.mean(-1).clamp(min=torch.finfo(torch.float32).tiny)


def overflow(stats: RoutingStats) -> Tensor:
    """Share of assignments that were dropped for lack of capacity.

    >>> overflow(RoutingStats(torch.tensor([3.0, 1.0]), *torch.tensor([1.0, 2.0, 4.0])))
    tensor(0.2500)
    """
    return stats.dropped / stats.expert_load.sum(-1).clamp(min=1)
