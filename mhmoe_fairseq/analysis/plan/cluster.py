"""Many ranks on paper: who shares experts with whom, and what the all-to-all moves at what speed."""

from collections import Counter
from dataclasses import dataclass

from ...common.errors import UserError
from ...moe import MHMoEConfig

_COUNT_BYTES = 8  # row counts travel as int64


@dataclass(frozen=True)
class Cluster:
    """The machines, and what one rank is given to do; all numbers above 0.

    Attributes:
        ranks: processes, one for each device; W.
        ranks_per_node: consecutive ranks that share a node.
        tokens: per rank and micro-batch.
        link: bytes per second that a rank sends inside its node, and receives at the same time.
        network: bytes per second that a node sends to all others, and receives at the same time.
        flops: floating-point operations per second that a rank reaches in training; None: times of computing are
            left out.
    """

    ranks: int
    ranks_per_node: int
    tokens: int
    link: float
    network: float
    flops: float | None = None

    def __post_init__(self) -> None:
        if self.ranks > self.ranks_per_node and self.ranks % self.ranks_per_node:
            raise UserError(f"--ranks-per-node ({self.ranks_per_node}) must divide --ranks ({self.ranks})")


@dataclass(frozen=True)
class Exchange:
    """The all-to-all of one MoE layer, for one rank and micro-batch; one direction unless it says otherwise.

    Attributes:
        size: ranks that share the experts; P.
        tokens: of the micro-batch.
        rows: routed rows, those to the rank's own experts included: tokens x H x K, exactly, without padding.
        row_bytes: of one row of D / H.
        off_rank: bytes to other ranks when all experts are chosen equally often.
        off_node: the part of them that leaves the node, for the node that has most to send, over its ranks.
        count_bytes: row counts to other ranks, once per forward pass.
        transfers: in a forward and backward pass; none if every rank has all experts.
        count_transfers: of the counts.
        seconds: of one transfer, by bandwidth alone.
    """

    size: int
    tokens: int
    rows: int
    row_bytes: int
    off_rank: float
    off_node: float
    count_bytes: int
    transfers: int
    count_transfers: int
    seconds: float

    @property
    def bytes(self) -> int:
        """All rows of one direction, the rank's own included."""
        return self.rows * self.row_bytes

    @property
    def message_bytes(self) -> float:
        """To one other rank."""
        return self.bytes / self.size


def exchange(moe: MHMoEConfig, cluster: Cluster, size: int, *, element: int, recompute: bool) -> Exchange:
    """What one MoE layer sends under dropless routing.

    H sub-tokens with K choices are H K rows of D / H numbers: K D numbers per token, whatever H is.

    Args:
        moe: the layer.
        cluster: the machines.
        size: ranks that share the experts, consecutive ones.
        element: bytes of a number, in the type that is computed in.
        recompute: the forward pass runs once more in the backward pass.
    """
    rows = cluster.tokens * moe.subtokens_per_token * moe.top_k
    row_bytes = moe.subtoken_dim * element
    sent = rows * row_bytes
    inside, outside = _shares(cluster, size)
    times = (sent * inside / cluster.link, cluster.ranks_per_node * sent * outside / cluster.network)
    passes = 0 if size == 1 else 2 if recompute else 1
    return Exchange(
        size=size,
        tokens=cluster.tokens,
        rows=rows,
        row_bytes=row_bytes,
        off_rank=sent * (size - 1) / size,
        off_node=sent * outside,
        count_bytes=(size - 1) * (moe.num_experts // size) * _COUNT_BYTES,
        transfers=2 * passes + 2 if passes else 0,
        count_transfers=passes,
        seconds=max(times),  # inside the nodes and between them at the same time
    )


def all_reduce_seconds(size: float, members: int, cluster: Cluster, *, apart: int = 1, at_once: int = 1) -> float:
    """A ring all-reduce of ``size`` bytes by bandwidth alone.

    Args:
        size: bytes on each rank.
        members: ranks that sum.
        cluster: the machines.
        apart: distance of neighbours in rank numbers: 1 for consecutive ranks.
        at_once: such rings that share a node's network.
    """
    if members == 1:
        return 0.0
    moved = 2 * size * (members - 1) / members
    if (members - 1) * apart < cluster.ranks_per_node:
        return moved / cluster.link
    return max(moved / cluster.link, at_once * moved / cluster.network)


def _shares(cluster: Cluster, size: int) -> tuple[float, float]:
    """Of a rank's rows: those to other ranks of its node at most, and those that leave the node of the busiest."""
    inside = outside = 0.0
    for first in range(0, cluster.ranks, cluster.ranks_per_node):
        ranks = range(first, min(first + cluster.ranks_per_node, cluster.ranks))
        here = Counter(rank // size for rank in ranks).values()  # the node's members of each bank
        inside = max(inside, max(members - 1 for members in here) / size)
        outside = max(outside, sum(members * (size - members) for members in here) / size / len(ranks))
    return inside, outside
