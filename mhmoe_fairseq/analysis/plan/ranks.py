"""Many ranks on paper: who shares experts with whom; memory, all-to-all and time of models, and tables of several."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...common.errors import UserError
from ...common.tables import MISSING, byte_size, duration, markdown_table, millions
from ...models.counts import ModelCounts
from ...moe import MergedConfig, MHMoEConfig
from .activation_memory import ActivationMemory, ModelShape

_COUNT_BYTES = 8  # row counts travel as int64
_STATISTIC_BYTES = 4


@dataclass(frozen=True)
class Precision:
    """Bytes per parameter of fairseq's ways to train.

    Attributes:
        flags: what is typed.
        optimizer: copies of weights and gradients in fp32, and Adam's two moments.
        host: in rank 0's memory while it saves: the checkpoint, and half weights until they are made fp32.
    """

    flags: str
    weights: int
    gradients: int
    optimizer: int
    host: int


# fairseq's checkpoints hold weights and Adam's moments in fp32, whatever was trained in.
SAVED_BYTES = 12
# Adam's moments are in fp32 in all of them. fp16 that is flattened is refused at more than one rank per bank.
PRECISIONS = (
    Precision("fp32, --mhmoe-precision", weights=4, gradients=4, optimizer=8, host=12),
    Precision("--fp16 --fp16-no-flatten-grads", weights=2, gradients=2, optimizer=16, host=14),
    Precision("--memory-efficient-fp16", weights=2, gradients=2, optimizer=8, host=14),
)


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

    def all_reduce_seconds(self, size: float, members: int, *, apart: int = 1, at_once: int = 1) -> float:
        """A ring all-reduce of ``size`` bytes on each rank, by bandwidth alone.

        Args:
            apart: distance of neighbours in rank numbers: 1 for consecutive ranks.
            at_once: such rings that share a node's network.
        """
        moved = 2 * size * (members - 1) / members
        is_inside = (members - 1) * apart < self.ranks_per_node
        return max(moved / self.link, 0 if is_inside else at_once * moved / self.network)

    def shares(self, size: int) -> tuple[float, float]:
        """Of a rank's rows for a bank of ``size`` ranks, the share to other ranks of its node, and out of the node.

        The first is of the rank that has most, the second of the node that has most to send, over its ranks.
        """
        inside = outside = 0.0
        for first in range(0, self.ranks, self.ranks_per_node):
            ranks = range(first, min(first + self.ranks_per_node, self.ranks))
            here = Counter(rank // size for rank in ranks).values()  # the node's members of each bank
            inside = max(inside, max(members - 1 for members in here) / size)
            outside = max(outside, sum(members * (size - members) for members in here) / size / len(ranks))
        return inside, outside


@dataclass(frozen=True)
class Exchange:
    """The all-to-all of one MoE layer, for one rank and micro-batch; one direction unless it says otherwise.

    Attributes:
        size: ranks that share the experts; P.
        by: what is shared out, ``"experts"`` or ``"heads"``.
        rows: those to the rank itself included: of experts the routed ones, tokens x H x K, exactly, without padding;
            of heads slices, tokens x P, whatever K is.
        row_bytes: of one row of D / H, or D / P.
        off_rank: bytes to other ranks, of experts when all are chosen equally often.
        off_node: the part of them that leaves the node, for the node that has most to send, over its ranks.
        count_bytes: row counts to other ranks, once per forward pass; of heads with padding and statistics.
        transfers: of rows, in a forward and backward pass; none if every rank has all experts.
        count_transfers: of the counts.
        seconds: of one transfer, by bandwidth alone.
    """

    size: int
    by: str
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


def exchange(
    moe: MHMoEConfig, cluster: Cluster, size: int, *, element: int, recompute: bool, by: str = "experts"
) -> Exchange:
    """What one MoE layer sends under dropless routing.

    H sub-tokens with K choices are H K rows of D / H numbers: K D numbers per token, whatever H is. Where heads are
    shared out (Head Parallel, arXiv 2602.04870), it is the D numbers of every token, whatever K is.

    Args:
        size: ranks that share the experts, consecutive ones.
        element: bytes of a number, in the type that is computed in.
        recompute: the forward pass runs once more in the backward pass.
    """
    if by == "heads":  # with a token's slice goes whether it is padding; what the heads did with all of them returns
        rows, width = cluster.tokens * size, moe.inner_dim // size
        beside = _COUNT_BYTES + cluster.tokens + (3 * moe.total_experts // size + 4) * _STATISTIC_BYTES
    else:
        rows, width = cluster.tokens * moe.subtokens_per_token * moe.top_k, moe.subtoken_dim
        beside = moe.total_experts // size * _COUNT_BYTES
    row_bytes = width * element
    sent = rows * row_bytes
    inside, outside = cluster.shares(size)
    times = (sent * inside / cluster.link, cluster.ranks_per_node * sent * outside / cluster.network)
    passes = 0 if size == 1 else 2 if recompute else 1
    return Exchange(
        size=size,
        by=by,
        tokens=cluster.tokens,
        rows=rows,
        row_bytes=row_bytes,
        off_rank=sent * (size - 1) / size,
        off_node=sent * outside,
        count_bytes=(size - 1) * beside,
        transfers=2 * passes + 2 if passes else 0,
        count_transfers=passes,
        seconds=max(times),  # inside the nodes and between them at the same time
    )


@dataclass(frozen=True)
class RankParameters:
    """Parameters on one rank: the dense part whole, its share of the experts."""

    dense: int
    expert: int

    def rounded_bytes(self, shape: ModelShape, backend: str) -> int:
        """Copies, in half precision or ternary, that wait for the backward pass; one layer's if recomputed.

        On a CPU ("loop") the experts' are made anew, one expert's at a time, unless they are ternary.
        """
        is_ternary = shape.moe is not None and shape.moe.quantize_experts
        dense = self.dense if shape.half else shape.ternary
        expert = self.expert if is_ternary or (shape.half and backend != "loop") else 0
        if shape.recompute:
            dense, expert = dense // shape.layers, expert // max(shape.moe_layers, 1)
        return shape.element * (dense + expert)


@dataclass(frozen=True)
class RankPlan:
    """One model on a cluster, per rank.

    Attributes:
        size: ranks that share one bank of experts.
        experts: of one MoE layer on a rank; None for a dense model.
        rounded: bytes of half-precision copies of weights.
        element: bytes of a number that is computed with.
        activations: bytes kept for the backward pass, at the peak, of one micro-batch.
        activations_recomputed: the same with ``--checkpoint-activations``.
        saved: parameters of the whole model, which a checkpoint holds.
        largest_tensor: bytes of the largest expert tensor in fp32: what saving may add to a rank's device memory.
        traffic: the all-to-all of one MoE layer; None for a dense model.
        train_flops: of one micro-batch, forward and backward.
        gradient_seconds: summing gradients, once per update.
        compute_seconds: of one micro-batch; None if the ranks' speed is not known.
        exchange_seconds: all transfers of all layers in one micro-batch.
    """

    name: str
    size: int
    experts: int | None
    parameters: RankParameters
    rounded: int
    element: int
    activations: int
    activations_recomputed: int
    saved: int
    largest_tensor: int
    moe_layers: int
    traffic: Exchange | None
    train_flops: int
    gradient_seconds: float
    compute_seconds: float | None
    exchange_seconds: float


def plan_ranks(
    name: str,
    counts: ModelCounts,
    shape: ModelShape,
    cluster: Cluster,
    size: int,
    *,
    by: str = "experts",
    cpu: bool = False,
) -> RankPlan:
    """Count one model on ``cluster`` with ``size`` ranks that share its experts, or heads."""
    backend = "loop" if cpu else "grouped" if shape.half else "blocked"
    if isinstance(shape.moe, MergedConfig):  # has none of these: batched products over whole segments
        backend = "blocked"
    memory = ActivationMemory(shape, backend, exchanged=size > 1 and by == "experts", cpu=cpu)
    parameters = RankParameters(counts.non_expert, counts.expert // size)
    moe, traffic, experts, largest, exchange_seconds = counts.moe, None, None, 0, 0.0
    if moe is not None:
        traffic = exchange(moe, cluster, size, element=shape.element, recompute=shape.recompute, by=by)
        exchange_seconds = counts.moe_layers * traffic.transfers * traffic.seconds
        experts = moe.total_experts // size
        largest = 4 * experts * moe.expert_ffn_dim * moe.subtoken_dim
    flops = cluster.tokens * counts.flops_per_token * (4 if shape.recompute else 3)
    dense_seconds = cluster.all_reduce_seconds(4 * parameters.dense, cluster.ranks)
    expert_seconds = cluster.all_reduce_seconds(
        4 * parameters.expert, cluster.ranks // size, apart=size, at_once=min(size, cluster.ranks_per_node)
    )
    return RankPlan(
        name=name,
        size=size,
        experts=experts,
        parameters=parameters,
        rounded=parameters.rounded_bytes(shape, backend),
        element=shape.element,
        activations=cluster.tokens * memory.peak(recompute=False),
        activations_recomputed=cluster.tokens * memory.peak(recompute=True),
        saved=counts.total,
        largest_tensor=largest,
        moe_layers=counts.moe_layers,
        traffic=traffic,
        train_flops=flops,
        gradient_seconds=dense_seconds + expert_seconds,
        compute_seconds=None if cluster.flops is None else flops / cluster.flops,
        exchange_seconds=exchange_seconds,
    )


def describe_ranks(plans: Sequence[RankPlan], cluster: Cluster, *, recompute: bool) -> str:
    """Tables, one column for each model, and how to read them."""
    nodes = -(-cluster.ranks // cluster.ranks_per_node)
    traffic = {plan.name: _traffic(plan.traffic) for plan in plans if plan.traffic is not None}
    paragraphs = [
        f"{cluster.ranks:,} ranks on {nodes:,} node{'s' if nodes > 1 else ''}, {cluster.tokens:,} tokens per rank and "
        f"micro-batch, {plans[0].element} bytes a number{', --checkpoint-activations' if recompute else ''};\n"
        f"{byte_size(cluster.link)}/s per rank inside a node, {byte_size(cluster.network)}/s per node between nodes",
        _table("memory", {plan.name: _memory(plan, cluster.ranks) for plan in plans}),
        "weights + gradients + Adam: with the fp32 copies that fp16 needs and the rounded ones that are kept.\n"
        "activations: the largest sum in one micro-batch under uniform routing. checkpoint: one file with weights and\n"
        "moments in fp32, as fairseq writes it. largest expert tensor: what a save may add to a rank's device memory.",
    ]
    if traffic:
        paragraphs += [
            _table("all-to-all of one MoE layer, one direction", traffic),
            "rows: sub-tokens x K, exactly (dropless routing), those for the rank's own experts included. off rank,\n"
            "off node: expected if all experts are chosen equally often. time: by bandwidth alone.",
        ]
    if any(plan.traffic is not None and plan.traffic.by == "heads" for plan in plans):
        paragraphs.append(
            "--mhmoe-parallel heads: rows are slices of tokens, one for each rank that shares the heads, whatever K;\n"
            "off rank and off node are exact; with the counts go padding and statistics."
        )
    paragraphs += [
        _table("time of one micro-batch", {plan.name: _times(plan) for plan in plans}),
        "gradients: their sum over all ranks, experts' over their replicas, in fp32, once per update.",
    ]
    return "\n\n".join(paragraphs)


def _table(title: str, columns: Mapping[str, dict[str, str]]) -> str:
    """A column of cells by their labels for every model, the same labels for all."""
    labels = next(iter(columns.values()))
    rows = [[label, *(cells[label] for cells in columns.values())] for label in labels]
    return markdown_table([title, *columns], rows)


def _memory(plan: RankPlan, ranks: int) -> dict[str, str]:
    parameters = plan.parameters.dense + plan.parameters.expert
    return {
        "EP x DP": f"{plan.size:,} x {ranks // plan.size:,}",
        "experts of a layer on a rank": MISSING if plan.experts is None else f"{plan.experts:,}",
        "dense parameters on a rank": millions(plan.parameters.dense),
        "expert parameters on a rank": millions(plan.parameters.expert),
        **{
            f"weights + gradients + Adam: {precision.flags}": byte_size(
                (precision.weights + precision.gradients + precision.optimizer) * parameters
                + (plan.rounded if precision is PRECISIONS[0] else 0)
            )
            for precision in PRECISIONS
        },
        "activations": byte_size(plan.activations),
        "activations, --checkpoint-activations": byte_size(plan.activations_recomputed),
        "checkpoint": byte_size(SAVED_BYTES * plan.saved),
        "host memory of rank 0 to save it, fp32": byte_size(PRECISIONS[0].host * plan.saved),
        "host memory of rank 0 to save it, fp16": byte_size(PRECISIONS[1].host * plan.saved),
        "largest expert tensor": byte_size(plan.largest_tensor) if plan.traffic else MISSING,
    }


def _traffic(traffic: Exchange) -> dict[str, str]:
    return {
        "rows per token": f"{traffic.rows // traffic.tokens:,}",
        "bytes of a row": f"{traffic.row_bytes:,}",
        "bytes per token": f"{traffic.bytes // traffic.tokens:,}",
        "rows of a rank": f"{traffic.rows:,}",
        "bytes of a rank": byte_size(traffic.bytes),
        "off rank": byte_size(traffic.off_rank),
        "off node": byte_size(traffic.off_node),
        "to one other rank": byte_size(traffic.bytes / traffic.size),
        "counts of the rows, beforehand": byte_size(traffic.count_bytes),
        "time": duration(traffic.seconds),
        "directions: forward + recomputed + backward": (
            f"2 + {traffic.transfers - 4} + 2" if traffic.transfers else "none"
        ),
    }


def _times(plan: RankPlan) -> dict[str, str]:
    cells = {
        "TFLOPs of a rank": f"{plan.train_flops / 1e12:,.2f}",
        "all-to-all, all layers and directions": duration(plan.exchange_seconds) if plan.traffic else MISSING,
        "gradients (once per update)": duration(plan.gradient_seconds),
    }
    if plan.compute_seconds is not None:
        cells["computing, at --tflops"] = duration(plan.compute_seconds)
    return cells
