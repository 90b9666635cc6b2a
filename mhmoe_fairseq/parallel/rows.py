"""Rows on their way to experts of other processes and back, with gradients, and counted.

Every process takes part in every transfer, with no rows too, forward and backward in the same order: autograd runs a
backward in the reverse order of the forward, which is the same on all processes.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .sharding import RankGroups, shard_experts


@dataclass
class TrafficCounter:
    """What really passed between processes, counted at each call; backward and recomputation included.

    Attributes:
        calls: all-to-all transfers of rows.
        rows: rows sent, those to this process itself included.
        bytes: of rows sent to other processes.
        count_bytes: of row counts sent to other processes beforehand.
    """

    calls: int = 0
    rows: int = 0
    bytes: int = 0
    count_bytes: int = 0


class DistributedExperts:
    """The expert parallelism that a layer is given; see ``moe.parallelism.ExpertParallelism``.

    Attributes:
        counter: real transfers since the start; may be replaced.
    """

    def __init__(self, groups: RankGroups, by: str = "experts") -> None:
        self.groups = groups
        self.by = by
        self.size = groups.size
        self.rank = groups.rank
        self.counter = TrafficCounter()

    def __deepcopy__(self, memo: dict[int, Any]) -> "DistributedExperts":
        """Itself: a copy of a model talks to the same processes."""
        return self

    def shard(self, module: nn.Module) -> None:
        """Mark the parameters, and make saved states those of one process."""
        shard_experts(module, self.groups)

    def scale_gradient(self, weight: Tensor) -> Tensor:
        """The identity, the gradient divided by the number of data-parallel processes.

        An expert gets the gradients of all processes' rows summed, where the others are averaged.
        """
        return _ScaleGradient.apply(weight, 1 / self.groups.world_size)

    def exchange_counts(self, load_E: Tensor) -> tuple[list[int], list[int], Tensor]:
        """Tell the others how many rows will come; see ``moe.parallelism.ExpertParallelism``."""
        sent_Pe = load_E.view(self.size, -1).long()
        received_Pe = torch.empty_like(sent_Pe)
        dist.all_to_all_single(received_Pe, sent_Pe, group=self.groups.experts)
        self.counter.count_bytes += (self.size - 1) * sent_Pe.size(1) * sent_Pe.element_size()
        # One read on the host for all sizes: the transfers need them there.
        sent, received = torch.stack([sent_Pe.sum(1), received_Pe.sum(1)]).tolist()
        return sent, received, received_Pe

    def transfer(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """``(sum(sent), d) -> (sum(received), d)``: consecutive pieces to each process and from each."""
        return _AllToAll.apply(rows, sent, received, self)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all data-parallel processes, on each of them; its gradient is the sum of their gradients."""
        return _AllReduceSum.apply(values)


def expert_parallelism(size: int, by: str = "experts") -> DistributedExperts:
    """What ``MHMoELayer(parallel=...)`` takes, for experts on ``size`` processes each.

    With ``by="heads"`` each has those of whole heads, and tokens travel before they are routed.

    Every process of the world must call it, with the same size, which divides their number (else ``ValueError``). With
    size 1 all experts stay on every process; the object then serves ``balance_scope="global"`` alone.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    if world_size % size:
        raise ValueError(f"expert-parallel size ({size}) must divide the number of processes ({world_size})")
    first = rank - rank % size
    experts, replicas = _group(range(first, first + size)), _group(range(rank % size, world_size, size))
    return DistributedExperts(RankGroups(size, rank % size, experts, replicas, world_size), by)


def _group(ranks: range) -> dist.ProcessGroup:
    # Made by its members alone: in a large world there are many groups.
    group = dist.new_group(list(ranks), use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup), "this process is a member"
    return group


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """All processes' rows, in the order of the ranks, which may have different numbers of them.

    Every process must call it, and if one needs gradients all must: in the backward pass each gets the sum of what all
    processes' losses say about its own rows.

    Returns:
        of ``(n, ...)`` rows on each, whose shapes are equal but for n: ``(sum of n, ...)``, and where this one's begin.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows, 0
    counts = [torch.empty(1, dtype=torch.long, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, counts[0].new_tensor([rows.size(0)]))
    sizes = torch.cat(counts).tolist()
    start = sum(sizes[: dist.get_rank()])
    everyone = rows.new_zeros(sum(sizes), *rows.shape[1:])
    everyone[start : start + rows.size(0)] = rows
    return _AllReduceSum.apply(everyone), start


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], parallel: DistributedExperts) -> Tensor:
        ctx.sent, ctx.received, ctx.parallel = sent, received, parallel
        arrived = rows.new_empty(sum(received), rows.size(1))
        dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=parallel.groups.experts)
        parallel.counter.calls += 1
        parallel.counter.rows += rows.size(0)
        parallel.counter.bytes += (rows.size(0) - sent[parallel.rank]) * rows.size(1) * rows.element_size()
        return arrived

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Through apply: a gradient that is to be differentiated again takes the same way.
        return _AllToAll.apply(grad, ctx.received, ctx.sent, ctx.parallel), None, None, None


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _AllReduceSum.apply(grad)
