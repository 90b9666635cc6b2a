"""From logits to a dispatch plan: which expert each sub-token goes to, with what weight, in what order.

Nothing here depends on values on the host: padded and dropped assignments go to a *virtual expert* E that sorts
behind the real ones, so every shape is known beforehand and no device synchronisation is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .config import MHMoEConfig


class Assignment(NamedTuple):
    """Chosen experts and gate weights.

    Attributes:
        experts_NK: int64, first choice first; E (the virtual expert) where ``keep_NK`` is False.
        gates_NK: weights of the experts' outputs, 0 where not kept.
        choices_NK: the experts chosen before padding, policy and capacity took any away.
        kept_NK: bool, not padding, not refused by the second-expert policy, within capacity; None: all.
        dropped_NK: bool, lost for lack of capacity only; None: none.
    """

    experts_NK: Tensor
    gates_NK: Tensor
    choices_NK: Tensor
    kept_NK: Tensor | None
    dropped_NK: Tensor | None


def top_k_experts(logits_NE: Tensor, probs_NE: Tensor, k: int, noise_NE: Tensor | None = None) -> Tensor:
    """The K best experts per row, ``(N, K)``; ties go to the lowest index, as in GShard.

    The first choice is the argmax of the softmax, the following ones of the remaining logits: two different logits can
    round to one probability, and TorchScale chooses so. ``noise_NE`` is added for all choices but the first.
    """
    first = probs_NE.argmax(dim=1, keepdim=True)
    chosen = [first]
    rest = logits_NE.detach() if noise_NE is None else logits_NE.detach() + noise_NE
    for _ in range(k - 1):
        rest = rest.scatter(1, chosen[-1], float("-inf"))
        chosen.append(rest.argmax(dim=1, keepdim=True))
    return torch.cat(chosen, dim=1)


def gumbel_noise(like: Tensor) -> Tensor:
    """Standard Gumbel noise (policy ``sampling``)."""
    return -torch.empty_like(like).exponential_().log()


def normalized(gates_NK: Tensor) -> Tensor:
    """Gate weights that sum to one per row."""
    return gates_NK / gates_NK.sum(1, keepdim=True).clamp(min=torch.finfo(gates_NK.dtype).eps)


def assign(
    config: MHMoEConfig,
    logits_NE: Tensor,
    probs_NE: Tensor,
    padding_mask_N: Tensor | None,
    *,
    training: bool,
    noise: Tensor | None = None,
) -> Assignment:
    """Choose experts and weights.

    Args:
        config: routing, policy and normalisation.
        logits_NE, probs_NE: the router's output and its softmax.
        padding_mask_N: True where padded.
        training: the second-expert policies apply in training only; evaluation draws no random number.
        noise: Gumbel noise ``(N, E)`` (``sampling``) or uniform ``(N,)`` (``random``) in place of fresh draws.
    """
    policy = config.second_expert_policy if training else "all"
    gumbel = None
    if policy == "sampling":
        gumbel = gumbel_noise(logits_NE) if noise is None else noise
    choices_NK = top_k_experts(logits_NE, probs_NE, config.top_k, gumbel)
    gates_NK = probs_NE.gather(1, choices_NK)
    normalize = config.normalize_gates and config.top_k > 1
    capacity_routing = config.routing == "capacity"
    if normalize and (config.normalize_before_dropping or not capacity_routing and policy != "random"):
        gates_NK = normalized(gates_NK)

    chosen_NK = None if padding_mask_N is None else (~padding_mask_N).unsqueeze(1).expand_as(choices_NK)
    if policy == "random":
        # GShard: the second expert is used with probability min(1, 2 g_2).
        uniform = torch.rand_like(gates_NK[:, 1]) if noise is None else noise
        sampled = torch.stack([torch.ones_like(uniform, dtype=torch.bool), 2 * gates_NK[:, 1] > uniform], dim=1)
        chosen_NK = sampled if chosen_NK is None else chosen_NK & sampled

    kept_NK, dropped_NK = chosen_NK, None
    if capacity_routing:
        if chosen_NK is None:
            chosen_NK = torch.ones_like(choices_NK, dtype=torch.bool)
        within = _within_capacity(config, choices_NK, chosen_NK, padding_mask_N, training)
        kept_NK, dropped_NK = chosen_NK & within, chosen_NK & ~within
    if kept_NK is None:
        return Assignment(choices_NK, gates_NK, choices_NK, None, None)
    gates_NK = gates_NK.masked_fill(~kept_NK, 0)
    if normalize and not config.normalize_before_dropping and (capacity_routing or policy == "random"):
        gates_NK = normalized(gates_NK)
    experts_NK = choices_NK.masked_fill(~kept_NK, config.num_experts)
    return Assignment(experts_NK, gates_NK, choices_NK, kept_NK, dropped_NK)


def _within_capacity(
    config: MHMoEConfig, choices_NK: Tensor, chosen_NK: Tensor, padding_mask_N: Tensor | None, training: bool
) -> Tensor:
    if padding_mask_N is None:
        num_real = torch.full((), choices_NK.size(0), device=choices_NK.device)
    else:
        num_real = (~padding_mask_N).sum()
    slots = slot_positions(choices_NK.masked_fill(~chosen_NK, config.num_experts), config.num_experts)
    return slots < expert_capacity(config, num_real, training=training)


def expert_capacity(config: MHMoEConfig, num_subtokens: Tensor, *, training: bool) -> Tensor:
    """Slots per expert as GShard and TorchScale count them: ``int(factor * K * ceil(N / E))``, in evaluation
    ``ceil(fraction * N)``; at least one.

    ``num_subtokens`` is a 0-dim integer tensor (real sub-tokens), so that counting padding costs no synchronisation.
    """
    num = num_subtokens.to(torch.float64)
    if not training and config.eval_capacity_fraction > 0:
        return (config.eval_capacity_fraction * num).ceil()
    return (config.capacity_factor * config.top_k * (num / config.num_experts).ceil()).floor().clamp(min=1)


def slot_positions(experts_NK: Tensor, num_experts: int) -> Tensor:
    """Position of every assignment in its expert's queue, ``(N, K)``.

    All first choices queue before all second ones, each in row order (GShard). Rows of the virtual expert get
    positions too; they mean nothing.
    """
    n, k = experts_NK.shape
    flat_KN = experts_NK.t().reshape(-1)
    order, offsets_E = sort_by_expert(flat_KN, num_experts)
    starts = torch.cat([offsets_E.new_zeros(1), offsets_E]).long()
    positions = torch.arange(n * k, device=flat_KN.device) - starts.index_select(0, flat_KN.index_select(0, order))
    return torch.empty_like(flat_KN).scatter_(0, order, positions).view(k, n).t()


def sort_by_expert(experts_R: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """A stable order by expert and where each real expert's rows end, ``(R,)`` int64 and ``(E,)`` int32."""
    sorted_R, order_R = torch.sort(experts_R, stable=True)
    bounds = torch.arange(num_experts, device=experts_R.device, dtype=experts_R.dtype)
    offsets_E = torch.searchsorted(sorted_R, bounds, right=True)
    return order_R, offsets_E.to(torch.int32)


@dataclass(frozen=True)
class DispatchPlan:
    """How rows travel to the experts and back.

    Routed row ``r = n * K + k`` is choice k of sub-token n.

    Attributes:
        order_R: the routed rows sorted by expert.
        inverse_R: the place of each routed row in that order.
        offsets_E: int32, where each expert's rows end in the order.
        top_k: K.
        all_real: no row belongs to the virtual expert (known without looking at the data).
    """

    order_R: Tensor
    inverse_R: Tensor
    offsets_E: Tensor
    top_k: int
    all_real: bool

    @property
    def source_R(self) -> Tensor:
        """The sub-token of every sorted row."""
        return torch.div(self.order_R, self.top_k, rounding_mode="floor")

    def expert_of_row(self) -> Tensor:
        """The expert of every sorted row, ``(R,)``; E for rows of the virtual expert."""
        rows = torch.arange(self.order_R.size(0), device=self.order_R.device, dtype=torch.int32)
        return torch.searchsorted(self.offsets_E, rows, right=True)

    def load(self) -> Tensor:
        """Rows per expert, ``(E,)`` int32."""
        return torch.diff(self.offsets_E, prepend=self.offsets_E.new_zeros(1))


def plan_dispatch(experts_NK: Tensor, num_experts: int, *, all_real: bool) -> DispatchPlan:
    """The plan for an assignment; ``all_real`` tells that no entry is the virtual expert."""
    order_R, offsets_E = sort_by_expert(experts_NK.reshape(-1), num_experts)
    positions = torch.arange(order_R.size(0), device=order_R.device)
    inverse_R = torch.empty_like(order_R).scatter_(0, order_R, positions)
    return DispatchPlan(order_R, inverse_R, offsets_E, experts_NK.size(1), all_real)


def combine(y_Rd: Tensor, gates_NK: Tensor, plan: DispatchPlan) -> Tensor:
    """Weighted sum of the experts' outputs, back in sub-token order: ``(R, d), (N, K) -> (N, d)``."""
    y_NKd = y_Rd.index_select(0, plan.inverse_R).view(*gates_NK.shape, y_Rd.size(1))
    return (y_NKd * gates_NK.to(y_Rd.dtype).unsqueeze(2)).sum(1)
