"""Few distinct numbers of rows: every expert's are rounded up where each new shape of a product costs a compilation."""

import dataclasses
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import DispatchPlan

_MOST = 64


class Layout(NamedTuple):
    """Rows as the loop has them: of the experts in turn, some of them added, then the virtual expert's.

    An added row repeats the last row of its expert and has the weight 0, so it reaches no result and no gradient.

    Attributes:
        plan: ``order_R`` has an entry for each of these rows; ``inverse_R`` tells the row of each routed row, of the
            virtual expert's the first. Nothing else of it is meant.
        ends: where the experts' rows end.
        is_real_R: bool, False for added rows; None if there are none.
    """

    plan: DispatchPlan
    ends: list[int]
    is_real_R: Tensor | None

    def gates(self, gates_NK: Tensor) -> Tensor:
        """The rows' weights, ``(R,)``."""
        gates_R = gates_NK.reshape(-1).index_select(0, self.plan.order_R)
        return gates_R if self.is_real_R is None else gates_R * self.is_real_R

    def pieces(self, size: int) -> list[tuple[int, list[slice]]]:
        """Each expert that has rows, with them in pieces of at most ``size``."""
        found = []
        for expert, (start, end) in enumerate(itertools.pairwise([0, *self.ends])):
            if start < end:
                found.append((expert, [slice(i, min(i + size, end)) for i in range(start, end, size)]))
        return found


def row_multiple(dtype: torch.dtype, rows: int, num_experts: int) -> int:
    """What an expert's number of rows is rounded up to a multiple of: in half precision an eighth of the mean, to 64.

    oneDNN, which multiplies there, compiles a kernel for each new shape, and experts get another number of rows in
    every step. MKL, which multiplies in float32, does not mind.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return 1
    eighth = max(rows // num_experts // 8, 1)
    return min(1 << eighth.bit_length() - 1, _MOST)


def lay_out(plan: DispatchPlan, multiple: int) -> Layout:
    """The plan's rows, each expert's rounded up to a multiple.

    >>> plan = plan_dispatch(torch.tensor([[0], [1], [0], [0]]), num_experts=2, all_real=True)
    >>> layout = lay_out(plan, 2)
    >>> layout.plan.order_R, layout.ends, layout.gates(torch.ones(4, 1))
    (tensor([0, 2, 3, 3, 1, 1]), [4, 6], tensor([1., 1., 1., 0., 1., 0.]))
    """
    ends, total = plan.offsets_E.tolist(), plan.order_R.size(0)
    if multiple == 1:
        inverse_R = plan.inverse_R if plan.all_real else plan.inverse_R.clamp(max=ends[-1])
        return Layout(dataclasses.replace(plan, inverse_R=inverse_R), ends, None)
    counts = [end - start for start, end in itertools.pairwise([0, *ends])]
    rounded = [-(-count // multiple) * multiple for count in counts]
    new_ends = list(itertools.accumulate(rounded))
    # The last group is the virtual expert's, whose rows stay as many as they are.
    virtual = total - ends[-1]
    groups = torch.tensor([[0, *ends], [*counts, virtual], [0, *new_ends], [*rounded, virtual]])
    start_G, count_G, new_start_G, new_count_G = groups
    start_P, count_P, new_start_P = torch.repeat_interleave(groups[:3], new_count_G, dim=1)
    within_P = torch.arange(new_start_P.size(0)) - new_start_P
    order_P = plan.order_R[start_P + torch.minimum(within_P, count_P - 1)]
    moved_R = torch.arange(total) + torch.repeat_interleave(new_start_G - start_G, count_G)
    moved = dataclasses.replace(plan, order_R=order_P, inverse_R=moved_R[plan.inverse_R].clamp(max=new_ends[-1]))
    return Layout(moved, new_ends, within_P < count_P)
