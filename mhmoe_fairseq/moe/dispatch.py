"""How rows travel to the experts and back, without a look at values on the host.

Assignments that are padded or dropped belong to the *virtual expert* E, which sorts behind the real ones.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def sort_by_expert(experts_R: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """A stable order by expert and where each real expert's rows end, ``(R,)`` int64 and ``(E,)`` int32.

    >>> sort_by_expert(torch.tensor([1, 0, 1]), num_experts=2)
    (tensor([1, 0, 2]), tensor([1, 3], dtype=torch.int32))
    """
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

    >>> plan = plan_dispatch(torch.tensor([[1, 0], [1, 2]]), num_experts=2, all_real=False)  # 2 is the virtual expert
    >>> plan.source_R, plan.expert_of_row(), plan.load()
    (tensor([0, 0, 1, 1]), tensor([0, 1, 1, 2]), tensor([1, 2], dtype=torch.int32))
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
    """The plan for an assignment; ``all_real`` tells that no entry is the virtual expert.

    >>> plan_dispatch(torch.tensor([[1], [0]]), num_experts=2, all_real=True).order_R
    tensor([1, 0])
    """
    order_R, offsets_E = sort_by_expert(experts_NK.reshape(-1), num_experts)
    positions = torch.arange(order_R.size(0), device=order_R.device)
    inverse_R = torch.empty_like(order_R).scatter_(0, order_R, positions)
    return DispatchPlan(order_R, inverse_R, offsets_E, experts_NK.size(1), all_real)


def combine(y_Rd: Tensor, gates_NK: Tensor, plan: DispatchPlan) -> Tensor:
    """Weighted sum of the experts' outputs, back in sub-token order: ``(R, d), (N, K) -> (N, d)``.

    >>> plan = plan_dispatch(torch.tensor([[1, 0]]), num_experts=2, all_real=True)
    >>> combine(torch.tensor([[1.0], [10.0]]), torch.tensor([[0.75, 0.25]]), plan)  # of experts 0 and 1
    tensor([[7.7500]])
    """
    y_NKd = y_Rd.index_select(0, plan.inverse_R).view(*gates_NK.shape, y_Rd.size(1))
    return (y_NKd * gates_NK.to(y_Rd.dtype).unsqueeze(2)).sum(1)
