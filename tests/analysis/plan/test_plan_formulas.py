"""Every figure of ``mhmoe plan`` by hand, from the sizes of a small model and a small cluster."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from language_models import small_dictionary, small_model

from mhmoe_fairseq.analysis.plan.activation_memory import ActivationMemory, ModelShape, shape_of
from mhmoe_fairseq.analysis.plan.ranks import Cluster, RankParameters, describe_ranks, plan_ranks
from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.common.tables import byte_size, duration
from mhmoe_fairseq.models.counts import ModelCounts, count_built
from mhmoe_fairseq.moe import MHMoEConfig

D, F, HEADS, LAYERS, WORDS = 32, 64, 2, 3, len(small_dictionary())
# 8 ranks on 4 nodes, 10 tokens each; a rank sends 100 bytes a second in its node, a node 20 to all others.
CLUSTER = Cluster(ranks=8, ranks_per_node=2, tokens=10, link=100.0, network=20.0, flops=1000.0)
SIZE = 4  # ranks that share the experts
FLAGS = {"decoder_layers": LAYERS, "moe_freq": 1, "moe_expert_count": 8, "mhmoe_heads_number": HEADS}


def planned(**flags: Any) -> tuple[ModelCounts, ModelShape]:
    """A model with experts in all of its layers."""
    model = small_model("mhmoe_lm_tiny", **{**FLAGS, **flags})
    return count_built(model, context=7), shape_of(model)


# ---------------------------------------------------------------------- FLOPs


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("arch, heads", [("mhmoe_lm_tiny", HEADS), ("xmoe_lm_tiny", 1)])
def test_flops_of_a_model_whose_layers_all_have_experts(arch: str, heads: int, top_k: int) -> None:
    flags = {**FLAGS, "moe_top_k": top_k}
    counts = count_built(small_model(arch, **(flags if heads > 1 else {**flags, "mhmoe_heads_number": None})), 7)
    moe, d = counts.moe, D // heads
    projections = 2 * D * D if heads > 1 else 0
    router = heads * (d * moe.router_dim + moe.router_dim * moe.num_experts)
    experts = heads * top_k * 2 * d * moe.expert_ffn_dim
    attention = 4 * D * D + 2 * D * 4  # four maps, scores and weighted sum over (7 + 1) / 2 tokens
    assert counts.moe_layers == LAYERS and moe.top_k == top_k
    assert counts.flops_per_token == 2 * (LAYERS * (attention + projections + router + experts) + D * WORDS)


def test_active_parameters_are_those_of_k_experts_in_every_layer() -> None:
    counts, _ = planned()
    one_expert = counts.expert // (LAYERS * counts.moe.num_experts)
    assert counts.active == counts.non_expert + LAYERS * counts.moe.top_k * one_expert


# ---------------------------------------------------------------------- one rank


def ring(size: float, members: int, *, at_once: int = 1) -> float:
    """Seconds of an all-reduce between nodes: every byte goes round twice, less a rank's own share."""
    moved = 2 * size * (members - 1) / members
    return max(moved / CLUSTER.link, at_once * moved / CLUSTER.network)


def test_times_of_a_rank() -> None:
    counts, shape = planned()
    plan = plan_ranks("mhmoe", counts, shape, CLUSTER, SIZE)
    assert (plan.experts, plan.parameters.dense, plan.parameters.expert) == (2, counts.non_expert, counts.expert // 4)
    assert plan.train_flops == 10 * counts.flops_per_token * 3  # a backward pass is twice the forward pass
    assert plan.compute_seconds == plan.train_flops / 1000
    # 10 tokens x 2 heads x 2 choices of 16 numbers; 2 of 4 ranks of a bank are on the other node, 2 share its network.
    sent = 10 * 2 * 2 * 16 * 4
    assert plan.traffic.seconds == 2 * sent / 2 / 20
    assert plan.exchange_seconds == LAYERS * 4 * plan.traffic.seconds  # there and back, forward and backward
    # Weights and gradients of 4 bytes: the dense part on all ranks, experts on two ranks that are 4 apart. Both ranks
    # of a node have such a partner, and use its network at once.
    dense, experts = ring(4 * counts.non_expert, 8), ring(4 * counts.expert // 4, 2, at_once=2)
    assert plan.gradient_seconds == pytest.approx(dense + experts)
    assert plan_ranks("mhmoe", counts, shape, CLUSTER, 8).gradient_seconds == pytest.approx(dense)
    recomputed = plan_ranks("mhmoe", counts, dataclasses.replace(shape, recompute=True), CLUSTER, SIZE)
    assert recomputed.train_flops == 10 * counts.flops_per_token * 4
    assert recomputed.exchange_seconds == LAYERS * 6 * plan.traffic.seconds


@pytest.mark.parametrize(
    "half, cpu, backend", [(False, False, "blocked"), (True, False, "grouped"), (False, True, "loop")]
)
@pytest.mark.parametrize("size", [1, SIZE])
def test_activations_are_those_of_all_tokens_under_the_backend_in_use(
    half: bool, cpu: bool, backend: str, size: int
) -> None:
    counts, shape = planned(dropout=0.1, **({"mhmoe_precision": "bf16"} if half else {}))
    plan = plan_ranks("mhmoe", counts, shape, CLUSTER, size, cpu=cpu)
    memory = ActivationMemory(shape, backend, exchanged=size > 1, cpu=cpu)
    assert plan.activations == 10 * memory.peak(recompute=False)
    assert plan.activations_recomputed == 10 * memory.peak(recompute=True) < plan.activations
    assert (plan.traffic.row_bytes, plan.traffic.transfers) == (16 * (2 if half else 4), 0 if size == 1 else 4)
    heads = plan_ranks("mhmoe", counts, shape, CLUSTER, size, by="heads", cpu=cpu)  # as many rows arrive as leave
    assert heads.activations == 10 * ActivationMemory(shape, backend, exchanged=False, cpu=cpu).peak(recompute=False)


def test_rounded_weights() -> None:
    counts, shape = planned()
    parameters = RankParameters(counts.non_expert, counts.expert // SIZE)
    half = dataclasses.replace(shape, half=True)
    one_layer = parameters.dense // LAYERS + parameters.expert // LAYERS
    assert parameters.rounded_bytes(shape, "grouped") == 0
    assert parameters.rounded_bytes(half, "grouped") == 2 * (counts.non_expert + counts.expert // 4)
    assert parameters.rounded_bytes(half, "loop") == 2 * counts.non_expert
    assert parameters.rounded_bytes(dataclasses.replace(half, recompute=True), "grouped") == 2 * one_layer


def test_copies_of_ternary_weights() -> None:
    for value in ("experts", "all"):
        counts, shape = planned(mhmoe_quantize=value)
        parameters = RankParameters(counts.non_expert, counts.expert // SIZE)
        maps = LAYERS * 4 * shape.settings.decoder_embed_dim**2 if value == "all" else 0
        assert parameters.rounded_bytes(shape, "loop") == 4 * (maps + parameters.expert)
        half = dataclasses.replace(shape, half=True)
        assert parameters.rounded_bytes(half, "loop") == 2 * (parameters.dense + parameters.expert)


# ---------------------------------------------------------------------- activations, per token


def moe_bytes(shape: ModelShape, **computation: Any) -> int:
    return ActivationMemory(shape, **{"backend": "grouped", "exchanged": False, "cpu": True, **computation}).moe_layer()


@pytest.mark.parametrize("flags", [{}, {"activation_fn": "relu"}, {"activation_fn": "silu", "no_bias": True}], ids=str)
def test_blocks_hold_twice_the_rows_at_most(flags: dict[str, Any]) -> None:
    """Of a GELU its input and its output, of a ReLU the output, of SwiGLU both maps, silu and product."""
    _, shape = planned(activation_dropout=0.1, no_subln=True, **flags)
    tensors = {"relu": 1, "silu": 4}.get(flags.get("activation_fn", "gelu"), 2)
    inner = HEADS * 2 * shape.moe.expert_ffn_dim * (tensors * 4 + 1)  # and a byte of the dropout mask
    assert moe_bytes(shape, backend="blocked") - moe_bytes(shape) == inner


def test_exchanged_rows_are_kept_as_received_and_as_they_come_back() -> None:
    _, shape = planned()
    rows = HEADS * 2
    order = rows * (2 * 8 + 4)  # two indices and a weight
    for backend, copies in (("loop", 2), ("grouped", 1)):
        extra = moe_bytes(shape, backend=backend, exchanged=True) - moe_bytes(shape, backend=backend)
        assert extra == copies * rows * D // HEADS * 4 + order


def test_a_dropout_mask_is_a_byte_on_a_device() -> None:
    _, shape = planned(dropout=0.1)
    # After the layer's experts, and after attention.
    assert moe_bytes(shape, cpu=True) - moe_bytes(shape, cpu=False) == 2 * D * 3


ROWS = HEADS * 2
# What changes in an MoE layer -> bytes that a token keeps more, without and with a gate.
CHANGES: list[tuple[str, dict[str, Any], Callable[[MHMoEConfig], tuple[int, int]]]] = [
    ("a router that normalises inputs too keeps both", {"router_normalize": "both"},
     lambda moe: (HEADS * moe.router_dim * 4,) * 2),
    ("an expert more: a probability and a logit", {"num_experts": 9}, lambda moe: (HEADS * 2 * 4,) * 2),
    ("a mask of a byte", {"activation_dropout": 0.1}, lambda moe: (ROWS * moe.expert_ffn_dim,) * 2),
    ("a shared expert: input and output of its activation; or both maps, silu and product", {"shared_expert_dim": 24},
     lambda moe: (24 * 2 * 4, 24 * 4 * 4)),
]  # fmt: skip


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("change, bytes_of", [row[1:] for row in CHANGES], ids=[row[0] for row in CHANGES])
def test_what_an_moe_layer_keeps_more(
    change: dict[str, Any], bytes_of: Callable[[MHMoEConfig], tuple[int, int]], gated: bool
) -> None:
    _, shape = planned(**({"activation_fn": "silu", "no_bias": True} if gated else {}))
    changed = dataclasses.replace(shape, moe=dataclasses.replace(shape.moe, **change))
    assert moe_bytes(changed) - moe_bytes(shape) == bytes_of(shape.moe)[gated]


def test_a_norm_in_the_experts_keeps_three_tensors() -> None:
    _, shape = planned(no_subln=True)
    normed = dataclasses.replace(shape, moe=dataclasses.replace(shape.moe, expert_layernorm=True))
    assert moe_bytes(normed) - moe_bytes(shape) == ROWS * shape.moe.expert_ffn_dim * 3 * 4


# ---------------------------------------------------------------------- tables and flags


def test_the_tables_show_the_planned_figures() -> None:
    counts, shape = planned(mhmoe_precision="bf16")
    plan = plan_ranks("ours", counts, shape, CLUSTER, SIZE)
    text = describe_ranks([plan], CLUSTER, recompute=False)
    cells = {}
    for line in text.splitlines():
        if line.startswith("| "):
            label, value = (cell.strip() for cell in line.strip("| ").rsplit("|", 1))
            cells[label] = value
    held, total = counts.non_expert + counts.expert // 4, counts.total
    expected = {
        "EP x DP": "4 x 2",
        "weights + gradients + Adam: fp32, --mhmoe-precision": byte_size(16 * held + 2 * held),
        "weights + gradients + Adam: --fp16 --fp16-no-flatten-grads": byte_size(20 * held),
        "weights + gradients + Adam: --memory-efficient-fp16": byte_size(12 * held),
        "activations": byte_size(plan.activations),
        "activations, --checkpoint-activations": byte_size(plan.activations_recomputed),
        "checkpoint": byte_size(12 * total),
        "host memory of rank 0 to save it, fp32": byte_size(12 * total),
        "host memory of rank 0 to save it, fp16": byte_size(14 * total),
        "largest expert tensor": byte_size(4 * 2 * counts.moe.expert_ffn_dim * D // HEADS),
        "rows per token": "4",
        "bytes of a row": "32",
        "bytes per token": "128",
        "rows of a rank": "40",
        "bytes of a rank": byte_size(1280),
        "off rank": byte_size(1280 * 3 / 4),
        "off node": byte_size(1280 * 2 / 4),
        "to one other rank": byte_size(1280 / 4),
        "counts of the rows, beforehand": byte_size(3 * 2 * 8),
        "time": duration(2 * 640 / 20),
        "directions: forward + recomputed + backward": "2 + 0 + 2",
        "all-to-all, all layers and directions": duration(LAYERS * 4 * 2 * 640 / 20),
        "gradients (once per update)": duration(plan.gradient_seconds),
        "computing, at --tflops": duration(30 * counts.flops_per_token / 1000),
    }
    assert {label: cells[label] for label in expected} == expected


def test_flags_are_in_the_units_of_their_help(tmp_path: Path) -> None:
    words = "--arch xmoe_lm_tiny --experts 12 --vocab-size 500 --ranks 8 --ranks-per-node 2 --tokens-per-rank 100"
    speeds = "--link 2 --network 8 --tflops 3"
    assert main(["plan", *words.split(), *speeds.split(), "--json", str(tmp_path / "plan.json")]) == 0
    dense, xmoe = json.loads((tmp_path / "plan.json").read_text())
    ranks = xmoe["ranks"]
    assert ranks["size"] == 4  # the most that divide both 12 experts and 8 ranks
    sent = ranks["traffic"]["rows"] * ranks["traffic"]["row_bytes"]
    assert ranks["traffic"]["rows"] == 100 * 2 and ranks["traffic"]["seconds"] == 2 * sent / 2 / 1e9
    assert ranks["compute_seconds"] == ranks["train_flops"] / 3e12
    assert dense["ranks"]["gradient_seconds"] == pytest.approx(2 * 4 * dense["total_params"] * 7 / 8 / 1e9)
    one_node = [*words.replace("--ranks-per-node 2", "--ranks-per-node 8").split(), *speeds.split()]
    assert main(["plan", *one_node, "--json", str(tmp_path / "plan.json")]) == 0
    dense, _ = json.loads((tmp_path / "plan.json").read_text())
    assert dense["ranks"]["gradient_seconds"] == pytest.approx(2 * 4 * dense["total_params"] * 7 / 8 / 2e9)
