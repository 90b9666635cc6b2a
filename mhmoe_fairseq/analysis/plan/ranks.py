"""The part of ``mhmoe plan`` about many ranks: memory, all-to-all and time of one model, and tables of several."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...common.tables import MISSING, byte_size, duration, markdown_table, millions
from ...models.counts import ModelCounts
from .activation_memory import Computation, ModelShape, activation_bytes, peak_bytes
from .cluster import Cluster, Exchange, all_reduce_seconds, exchange


@dataclass(frozen=True)
class Precision:
    """Bytes per parameter of fairseq's ways to train.

    Attributes:
        flags: what is typed.
        weights: in the model.
        gradients: of the weights.
        optimizer: copies of weights and gradients in fp32, and Adam's two moments.
        host: in rank 0's memory while it saves: the checkpoint, and half weights until they are made fp32.
    """

    flags: str
    weights: int
    gradients: int
    optimizer: int
    host: int

    @property
    def total(self) -> int:
        """On a rank, while training."""
        return self.weights + self.gradients + self.optimizer


# fairseq's checkpoints hold weights and Adam's moments in fp32, whatever was trained in.
SAVED_BYTES = 12
# Adam's moments are in fp32 in all of them. fp16 that is flattened is refused at more than one rank per bank.
PRECISIONS = (
    Precision("fp32, --mhmoe-precision", weights=4, gradients=4, optimizer=8, host=12),
    Precision("--fp16 --fp16-no-flatten-grads", weights=2, gradients=2, optimizer=16, host=14),
    Precision("--memory-efficient-fp16", weights=2, gradients=2, optimizer=8, host=14),
)


@dataclass(frozen=True)
class RankParameters:
    """Parameters on one rank: the dense part whole, its share of the experts."""

    dense: int
    expert: int

    @property
    def total(self) -> int:
        """Both."""
        return self.dense + self.expert


def rank_parameters(counts: ModelCounts, size: int) -> RankParameters:
    """With ``size`` ranks that share the experts."""
    return RankParameters(counts.non_expert, counts.expert // size)


def rounded_weight_bytes(shape: ModelShape, parameters: RankParameters) -> int:
    """Copies of the weights in the half type that autocast keeps for the backward pass; one layer's if recomputed."""
    if not shape.half:
        return 0
    if not shape.recompute:
        return 2 * parameters.total
    return 2 * (parameters.dense // shape.layers + parameters.expert // max(shape.moe_layers, 1))


def largest_expert_bytes(counts: ModelCounts, size: int) -> int:
    """The largest expert tensor of a rank, in fp32: what saving may add to its device's memory."""
    if counts.moe is None:
        return 0
    return 4 * (counts.moe.num_experts // size) * counts.moe.expert_ffn_dim * counts.moe.subtoken_dim


@dataclass(frozen=True)
class RankPlan:
    """One model on a cluster, per rank.

    Attributes:
        name: the family.
        size: ranks that share one bank of experts.
        experts: of one MoE layer on a rank; None for a dense model.
        parameters: on a rank.
        rounded: bytes of half-precision copies of weights.
        activations: bytes kept for the backward pass, at the peak, of one micro-batch.
        activations_recomputed: the same with ``--checkpoint-activations``.
        saved: parameters of the whole model, which a checkpoint holds.
        largest_tensor: bytes of the largest expert tensor.
        moe_layers: layers with experts.
        traffic: the all-to-all of one of them; None for a dense model.
        train_flops: of one micro-batch, forward and backward.
        gradient_seconds: summing gradients, once per update.
        compute_seconds: of one micro-batch; None if the ranks' speed is not known.
    """

    name: str
    size: int
    experts: int | None
    parameters: RankParameters
    rounded: int
    activations: int
    activations_recomputed: int
    saved: int
    largest_tensor: int
    moe_layers: int
    traffic: Exchange | None
    train_flops: int
    gradient_seconds: float
    compute_seconds: float | None

    @property
    def exchange_seconds(self) -> float:
        """All transfers of all layers in one micro-batch."""
        return 0.0 if self.traffic is None else self.moe_layers * self.traffic.transfers * self.traffic.seconds

    def as_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {**dataclasses.asdict(self), "exchange_seconds": self.exchange_seconds}


def plan_ranks(
    name: str, counts: ModelCounts, shape: ModelShape, cluster: Cluster, size: int, *, cpu: bool = False
) -> RankPlan:
    """Count one model on ``cluster`` with ``size`` ranks to a bank of experts."""
    backend = "loop" if cpu else "grouped" if shape.half else "blocked"
    parts = activation_bytes(shape, Computation(backend, exchanged=size > 1, cpu=cpu))
    parameters = rank_parameters(counts, size)
    traffic = None
    if counts.moe is not None:
        traffic = exchange(counts.moe, cluster, size, element=shape.element, recompute=shape.recompute)
    flops = cluster.tokens * counts.flops_per_token * (4 if shape.recompute else 3)
    replicas = cluster.ranks // size
    return RankPlan(
        name=name,
        size=size,
        experts=None if counts.moe is None else counts.moe.num_experts // size,
        parameters=parameters,
        rounded=rounded_weight_bytes(shape, parameters),
        activations=cluster.tokens * peak_bytes(shape, parts, recompute=False),
        activations_recomputed=cluster.tokens * peak_bytes(shape, parts, recompute=True),
        saved=counts.total,
        largest_tensor=largest_expert_bytes(counts, size),
        moe_layers=counts.moe_layers,
        traffic=traffic,
        train_flops=flops,
        gradient_seconds=all_reduce_seconds(4 * parameters.dense, cluster.ranks, cluster)
        + all_reduce_seconds(
            4 * parameters.expert, replicas, cluster, apart=size, at_once=min(size, cluster.ranks_per_node)
        ),
        compute_seconds=None if cluster.flops is None else flops / cluster.flops,
    )


def describe_ranks(plans: Sequence[RankPlan], cluster: Cluster, *, half: bool, recompute: bool) -> str:
    """Tables, one column for each model, and how to read them."""
    nodes = -(-cluster.ranks // cluster.ranks_per_node)
    nodes_in_words = "1 node" if nodes == 1 else f"{nodes:,} nodes"
    routed = [plan for plan in plans if plan.traffic is not None]
    paragraphs = [
        f"{cluster.ranks:,} ranks on {nodes_in_words}, {cluster.tokens:,} tokens per rank and micro-batch, "
        f"{2 if half else 4} bytes a number{', --checkpoint-activations' if recompute else ''};\n"
        f"{byte_size(cluster.link)}/s per rank inside a node, {byte_size(cluster.network)}/s per node between nodes",
        _table("memory", plans, _memory(plans, cluster)),
        "weights + gradients + Adam: with the fp32 copies that fp16 needs and the rounded ones that autocast keeps.\n"
        "activations: the largest sum in one micro-batch under uniform routing. checkpoint: one file with weights and\n"
        "moments in fp32, as fairseq writes it. largest expert tensor: what a save may add to a rank's device memory.",
    ]
    if routed:
        paragraphs += [
            _table("all-to-all of one MoE layer, one direction", routed, _traffic(routed)),
            "rows: sub-tokens x K, exactly (dropless routing), those for the rank's own experts included. off rank,\n"
            "off node: expected if all experts are chosen equally often. time: by bandwidth alone.",
        ]
    paragraphs += [
        _table("time of one micro-batch", plans, _times(plans)),
        "gradients: their sum over all ranks, experts' over their replicas, in fp32, once per update.",
    ]
    return "\n\n".join(paragraphs)


def _table(title: str, plans: Sequence[RankPlan], rows: dict[str, list[str]]) -> str:
    return markdown_table([title, *(plan.name for plan in plans)], [[label, *cells] for label, cells in rows.items()])


def _memory(plans: Sequence[RankPlan], cluster: Cluster) -> dict[str, list[str]]:
    states = {
        f"weights + gradients + Adam: {precision.flags}": [
            byte_size(precision.total * plan.parameters.total + (plan.rounded if precision is PRECISIONS[0] else 0))
            for plan in plans
        ]
        for precision in PRECISIONS
    }
    return {
        "EP x DP": [f"{plan.size:,} x {cluster.ranks // plan.size:,}" for plan in plans],
        "experts of a layer on a rank": [MISSING if plan.experts is None else f"{plan.experts:,}" for plan in plans],
        "dense parameters on a rank": [millions(plan.parameters.dense) for plan in plans],
        "expert parameters on a rank": [millions(plan.parameters.expert) for plan in plans],
        **states,
        "activations": [byte_size(plan.activations) for plan in plans],
        "activations, --checkpoint-activations": [byte_size(plan.activations_recomputed) for plan in plans],
        "checkpoint": [byte_size(SAVED_BYTES * plan.saved) for plan in plans],
        **{
            f"host memory of rank 0 to save it, {kind}": [byte_size(precision.host * plan.saved) for plan in plans]
            for kind, precision in (("fp32", PRECISIONS[0]), ("fp16", PRECISIONS[1]))
        },
        "largest expert tensor": [byte_size(plan.largest_tensor) if plan.traffic else MISSING for plan in plans],
    }


def _traffic(plans: Sequence[RankPlan]) -> dict[str, list[str]]:
    traffic = [plan.traffic for plan in plans if plan.traffic is not None]
    return {
        "rows per token": [f"{one.rows // one.tokens:,}" for one in traffic],
        "bytes of a row": [f"{one.row_bytes:,}" for one in traffic],
        "bytes per token": [f"{one.bytes // one.tokens:,}" for one in traffic],
        "rows of a rank": [f"{one.rows:,}" for one in traffic],
        "bytes of a rank": [byte_size(one.bytes) for one in traffic],
        "off rank": [byte_size(one.off_rank) for one in traffic],
        "off node": [byte_size(one.off_node) for one in traffic],
        "to one other rank": [byte_size(one.message_bytes) for one in traffic],
        "counts of the rows, beforehand": [byte_size(one.count_bytes) for one in traffic],
        "time": [duration(one.seconds) for one in traffic],
        "directions: forward + recomputed + backward": [
            f"2 + {one.transfers - 4} + 2" if one.transfers else "none" for one in traffic
        ],
    }


def _times(plans: Sequence[RankPlan]) -> dict[str, list[str]]:
    rows = {
        "TFLOPs of a rank": [f"{plan.train_flops / 1e12:,.2f}" for plan in plans],
        "all-to-all, all layers and directions": [
            duration(plan.exchange_seconds) if plan.traffic else MISSING for plan in plans
        ],
        "gradients (once per update)": [duration(plan.gradient_seconds) for plan in plans],
    }
    if all(plan.compute_seconds is not None for plan in plans):
        rows["computing, at --tflops"] = [duration(plan.compute_seconds or 0) for plan in plans]
    return rows
