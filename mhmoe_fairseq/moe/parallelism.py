"""What the layer asks of expert parallelism, and its forward pass through it.

``mhmoe_fairseq.parallel`` provides the objects; here nothing knows about processes. P is the number of processes that
share the experts, e = E / P the experts of one of them, M the rows one of them receives.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dispatch import DispatchPlan, combine

PARALLELISMS = ("experts", "heads")  # what is shared out


class Traffic(NamedTuple):
    """What one process sent to the experts in one forward pass; the same comes back, and both again in the backward.

    Attributes:
        rows: routed rows, those to its own experts included.
        bytes: of the rows that went to other processes.

    >>> Traffic(rows=10, bytes=4096).rows
    10
    """

    rows: int
    bytes: int


class ExpertParallelism(Protocol):
    """Experts spread over ``size`` processes, of which this is number ``rank``; every process runs every forward.

    Attributes:
        by: what travels: ``"experts"``, rows to the chosen experts, or ``"heads"``, slices to the heads' processes.
    """

    size: int
    rank: int
    by: str

    def shard(self, module: nn.Module) -> None:
        """Told once the module has its parameters, of which dim 0 is this process's experts."""

    def scale_gradient(self, weight: Tensor) -> Tensor:
        """The identity; corrects the gradient for what the data-parallel average does to it."""

    def exchange_counts(self, load_E: Tensor) -> tuple[list[int], list[int], Tensor]:
        """Begin a forward pass; ``load_E`` counts this process's rows per expert.

        Returns:
            How many rows go to each process and come from each, and, int64 ``(P, e)``, for which experts they come.
        """

    def transfer(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send ``(sum(sent), d)``, a piece to each process, and get ``(sum(received), d)``, a piece from each."""

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all data-parallel processes, differentiable."""


def exchanged_ffn(
    parallel: ExpertParallelism,
    x_Nd: Tensor,
    gates_NK: Tensor,
    plan: DispatchPlan,
    local_ffn: Callable[[Tensor, Tensor, DispatchPlan], Tensor],
) -> tuple[Tensor, Traffic]:
    """Gate-weighted sum of the chosen experts' outputs, wherever the experts are.

    Rows of the virtual expert are not sent. ``local_ffn`` computes this process's experts on the received rows, each
    with gate weight 1: the weights stay with the sub-tokens.

    >>> from types import SimpleNamespace
    >>> alone = SimpleNamespace(rank=0, exchange_counts=lambda load: ([2], [2], load.view(1, -1).long()),
    ...     transfer=lambda rows, sent, received: rows)  # a "process" that has all experts itself
    >>> plan = plan_dispatch(torch.tensor([[1], [0]]), num_experts=2, all_real=True)
    >>> doubled = lambda x_Nd, gates_NK, plan: 2 * x_Nd
    >>> exchanged_ffn(alone, torch.eye(2), torch.ones(2, 1), plan, doubled)
    (tensor([[2., 0.],
            [0., 2.]]), Traffic(rows=2, bytes=0))
    """
    sent, received, received_Pe = parallel.exchange_counts(plan.load())
    num_sent, num_received = sum(sent), sum(received)
    x_Sd = x_Nd.index_select(0, plan.source_R[:num_sent])
    received_Md = parallel.transfer(x_Sd, sent, received)
    ones_M1 = received_Md.new_ones(num_received, 1)
    y_Md = local_ffn(received_Md, ones_M1, plan_received(received_Pe, num_received))
    y_Rd = parallel.transfer(y_Md, received, sent)
    if not plan.all_real:
        y_Rd = F.pad(y_Rd, (0, 0, 0, plan.order_R.size(0) - num_sent))
    sent_away = num_sent - sent[parallel.rank]
    traffic = Traffic(num_sent, sent_away * x_Sd.size(1) * x_Sd.element_size())
    return combine(y_Rd, gates_NK, plan), traffic


def plan_received(received_Pe: Tensor, num_received: int) -> DispatchPlan:
    """The plan for rows that arrive sorted by sender, then expert; one expert per row.

    Only the blocks (sender, expert) change places, so nothing needs sorting.

    >>> plan_received(torch.tensor([[1, 1], [0, 2]]), num_received=4).offsets_E  # by sender and expert
    tensor([1, 4], dtype=torch.int32)
    """
    by_sender = received_Pe.reshape(-1)
    by_expert = received_Pe.t().reshape(-1)
    starts_Pe = (by_sender.cumsum(0) - by_sender).view_as(received_Pe)
    places_eP = (by_expert.cumsum(0) - by_expert).view_as(received_Pe.t())
    moves_eP = starts_Pe.t() - places_eP
    rows = torch.arange(num_received, device=received_Pe.device)
    order_R = rows + torch.repeat_interleave(moves_eP.reshape(-1), by_expert, output_size=num_received)
    inverse_R = rows - torch.repeat_interleave(moves_eP.t().reshape(-1), by_sender, output_size=num_received)
    offsets_e = received_Pe.sum(0).cumsum(0).to(torch.int32)
    return DispatchPlan(order_R, inverse_R, offsets_e, top_k=1, all_real=True)
