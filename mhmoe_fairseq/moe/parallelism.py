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


class Exchange(Protocol):
    """One forward pass's transfer of rows between processes; its sizes are known on every side.

    Attributes:
        num_sent: routed rows of this process.
        num_received: M, the rows that come to this process's experts.
        received_Pe: int64, how many of them each process sent to each expert here.
        own_rows: rows that stay on this process.
    """

    num_sent: int
    num_received: int
    received_Pe: Tensor
    own_rows: int

    def dispatch(self, x_Sd: Tensor) -> Tensor:
        """Rows sorted by expert to where the experts are, ``(num_sent, d) -> (M, d)``: by sender, then expert."""

    def collect(self, y_Md: Tensor) -> Tensor:
        """The way back: ``(M, d) -> (num_sent, d)``."""


class ExpertParallelism(Protocol):
    """Experts spread over ``size`` processes, of which this is number ``rank``; every process runs every forward."""

    size: int
    rank: int

    def shard(self, module: nn.Module, num_experts: int) -> None:
        """Told once the module has its parameters, of which dim 0 is this process's experts."""

    def scale_gradient(self, weight: Tensor) -> Tensor:
        """The identity; corrects the gradient for what the data-parallel average does to it."""

    def exchange(self, load_E: Tensor) -> Exchange:
        """Begin a forward pass; ``load_E`` counts this process's rows per expert."""

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all data-parallel processes, differentiable."""


def local_experts(parallel: ExpertParallelism | None, num_experts: int) -> range:
    """The experts that live on this process.

    Raises:
        ValueError: if the processes cannot have equally many.

    >>> local_experts(None, num_experts=4)
    range(0, 4)
    """
    if parallel is None:
        return range(num_experts)
    if num_experts % parallel.size:
        raise ValueError(f"expert parallelism over {parallel.size} processes must divide num_experts ({num_experts})")
    local = num_experts // parallel.size
    return range(parallel.rank * local, (parallel.rank + 1) * local)


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
    >>> here = SimpleNamespace(num_sent=2, num_received=2, received_Pe=torch.tensor([[1, 1]]), own_rows=2,
    ...     dispatch=lambda x: x, collect=lambda y: y)  # a "process" that has all experts itself
    >>> plan = plan_dispatch(torch.tensor([[1], [0]]), num_experts=2, all_real=True)
    >>> doubled = lambda x_Nd, gates_NK, plan: 2 * x_Nd
    >>> exchanged_ffn(SimpleNamespace(exchange=lambda load: here), torch.eye(2), torch.ones(2, 1), plan, doubled)
    (tensor([[2., 0.],
            [0., 2.]]), Traffic(rows=2, bytes=0))
    """
    exchange = parallel.exchange(plan.load())
    x_Sd = x_Nd.index_select(0, plan.source_R[: exchange.num_sent])
    received_Md = exchange.dispatch(x_Sd)
    ones_M1 = received_Md.new_ones(exchange.num_received, 1)
    y_Md = local_ffn(received_Md, ones_M1, plan_received(exchange.received_Pe, exchange.num_received))
    y_Rd = exchange.collect(y_Md)
    if not plan.all_real:
        y_Rd = F.pad(y_Rd, (0, 0, 0, plan.order_R.size(0) - exchange.num_sent))
    sent_away = exchange.num_sent - exchange.own_rows
    traffic = Traffic(exchange.num_sent, sent_away * x_Sd.size(1) * x_Sd.element_size())
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
