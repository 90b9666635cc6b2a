"""``mhmoe plan --ranks``: traffic and bytes per rank, against real models, and sizes that no test machine has."""

import itertools
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import optim
from fairseq.utils import move_to_cpu
from language_models import small_dictionary, small_model
from omegaconf import OmegaConf
from plan_ranks import LENGTH, ROWS, measure, options_of
from trained_model import TrainedModel

from mhmoe_fairseq.analysis.plan.activation_memory import ActivationMemory, shape_of
from mhmoe_fairseq.analysis.plan.ranks import PRECISIONS, SAVED_BYTES, Cluster, exchange, plan_ranks
from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.models.counts import build_on_meta, count_built
from mhmoe_fairseq.moe import MHMoEConfig

LAYER = MHMoEConfig(embed_dim=64, num_heads=4, num_experts=48, top_k=2, expert_ffn_dim=8)


def cluster(ranks: int = 8, ranks_per_node: int = 4, tokens: int = 10, **speeds: Any) -> Cluster:
    return Cluster(ranks, ranks_per_node, tokens, **{"link": 100.0, "network": 20.0, **speeds})


def plan_json(path: Path, *words: object) -> list[dict]:
    assert main(["plan", *map(str, words), "--json", str(path)]) == 0
    return json.loads(path.read_text())


# ---------------------------------------------------------------------- all-to-all


@pytest.mark.parametrize("ranks, per_node, size", [(8, 4, 8), (8, 4, 2), (12, 4, 6), (12, 2, 3), (6, 6, 3), (4, 8, 4)])
def test_shares_off_rank_and_off_node_are_those_of_every_pair_of_ranks(ranks: int, per_node: int, size: int) -> None:
    plan = exchange(LAYER, cluster(ranks, per_node), size, element=4, recompute=False)
    away = {rank: 0.0 for rank in range(ranks)}
    outside = {node: 0.0 for node in range(-(-ranks // per_node))}
    for sender, receiver in itertools.permutations(range(ranks), 2):
        if sender // size == receiver // size:
            away[sender] += plan.bytes / size
            if sender // per_node != receiver // per_node:
                outside[sender // per_node] += plan.bytes / size / min(per_node, ranks)
    assert list(away.values()) == pytest.approx([plan.off_rank] * ranks)
    assert plan.off_node == pytest.approx(max(outside.values()))


def test_heads_make_more_rows_and_not_more_bytes() -> None:
    one_head = MHMoEConfig(embed_dim=64, num_experts=48, top_k=2, expert_ffn_dim=8)
    plain = exchange(one_head, cluster(), 8, element=2, recompute=False)
    heads = exchange(LAYER, cluster(), 8, element=2, recompute=False)
    assert (heads.rows, heads.row_bytes) == (4 * plain.rows, plain.row_bytes // 4)
    assert (heads.bytes, heads.off_rank, heads.seconds) == (plain.bytes, plain.off_rank, plain.seconds)


def test_time_is_that_of_the_slower_link_and_recomputing_sends_again() -> None:
    plan = exchange(LAYER, cluster(), 8, element=4, recompute=False)
    # 10 tokens x 2 choices x 64 numbers x 4 bytes; 4 of 8 ranks are on the other node, 4 ranks share its network.
    assert plan.bytes == 5120
    assert plan.seconds == 4 * 5120 / 2 / 20
    fast = exchange(LAYER, cluster(network=1e9), 8, element=4, recompute=False)
    assert fast.seconds == 5120 * 3 / 8 / 100
    again = exchange(LAYER, cluster(), 8, element=4, recompute=True)
    alone = exchange(LAYER, cluster(), 1, element=4, recompute=True)
    assert (alone.transfers, alone.off_rank, alone.seconds) == (0, 0, 0)
    assert (plan.transfers, plan.count_transfers) == (4, 1) and (again.transfers, again.count_transfers) == (6, 2)
    assert plan.count_bytes == 7 * 6 * 8


def test_gradients_travel_once_around_the_ring() -> None:
    seconds = cluster().all_reduce_seconds
    assert seconds(1000, 1) == 0
    assert seconds(1000, 4) == 2 * 1000 * 3 / 4 / 100  # inside one node
    assert seconds(1000, 8) == 2 * 1000 * 7 / 8 / 20
    assert seconds(1000, 2, apart=4, at_once=4) == 4 * 1000 / 20  # replicas on two nodes


# ---------------------------------------------------------------------- memory


def test_parameters_of_a_rank_are_the_dense_part_and_its_share_of_the_experts() -> None:
    model = small_model("mhmoe_lm_tiny")
    counts = count_built(model, 16)
    plan = plan_ranks("ours", counts, shape_of(model), cluster(), 4)
    assert plan.parameters.dense == counts.non_expert and 4 * plan.parameters.expert == counts.expert
    assert plan.largest_tensor == 4 * 2 * counts.moe.expert_ffn_dim * counts.moe.subtoken_dim


@pytest.mark.parametrize("flags", ["", "--fp16 --fp16-no-flatten-grads", "--memory-efficient-fp16"])
def test_bytes_per_parameter_are_those_of_fairseqs_optimizers(flags: str) -> None:
    (expected,) = [precision for precision in PRECISIONS if precision.flags.startswith(flags or "fp32")]
    model = small_model("mhmoe_lm_tiny", dictionary=small_dictionary(400))
    config = trainer_config(flags)
    parameters = list((model.half() if flags else model).parameters())
    if flags.startswith("--memory"):
        optimizer = optim.MemoryEfficientFP16Optimizer.build_optimizer(config, parameters)
    elif flags:
        optimizer = optim.FP16Optimizer.build_optimizer(config, parameters)
    else:
        optimizer = optim.build_optimizer(config.optimizer, parameters)
    optimizer.backward(sum(parameter.float().sum() for parameter in parameters))
    optimizer.step()
    inner = optimizer.fp32_optimizer if flags == "--fp16 --fp16-no-flatten-grads" else optimizer
    copies = [] if inner is optimizer else list(inner.params)
    count = sum(parameter.numel() for parameter in parameters)
    moments = [value for state in inner.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    extra = moments + [tensor for copy in copies for tensor in (copy, copy.grad)]
    assert sum(parameter.nbytes for parameter in parameters) == expected.weights * count
    assert sum(parameter.grad.nbytes for parameter in parameters) == expected.gradients * count
    assert sum(tensor.nbytes for tensor in extra) == expected.optimizer * count
    # What Trainer.save_checkpoint does with its state: half weights stand beside their copies for a moment.
    saved = move_to_cpu([parameter.detach() for parameter in parameters] + moments)
    assert sum(tensor.nbytes for tensor in saved) == SAVED_BYTES * count
    assert (SAVED_BYTES + (expected.weights if flags else 0)) * count == expected.host * count


def trainer_config(flags: str) -> Any:
    """As much of fairseq's configuration as its optimizers read."""
    adam = {"_name": "adam", "lr": [0.1], "adam_betas": "(0.9, 0.98)", "adam_eps": 1e-8, "weight_decay": 0.0,
            "use_old_adam": True, "fp16_adam_stats": False, "tpu": False}  # fmt: skip
    common = {"fp16": bool(flags), "bf16": False, "fp16_init_scale": 4, "fp16_scale_window": 1, "tpu": False,
              "fp16_scale_tolerance": 0.0, "threshold_loss_scale": None, "min_loss_scale": 1e-4,
              "fp16_no_flatten_grads": True}  # fmt: skip
    return OmegaConf.create({
        "optimizer": adam, "common": common, "optimization": {"update_freq": [1]},
        "distributed_training": {"distributed_world_size": 1, "pipeline_model_parallel": False},
    })  # fmt: skip


def test_a_checkpoint_has_the_planned_size(trained_model: TrainedModel, tmp_path: Path) -> None:
    flags = ["--layers", 2, "--embed-dim", 64, "--vocab-size", 344, "--tokens-per-sample", 64, "--ranks", 4]
    row = plan_json(tmp_path / "plan.json", "--arch", "mhmoe_lm_tiny", *flags)[-1]
    assert SAVED_BYTES * row["ranks"]["saved"] == pytest.approx(trained_model.checkpoint.stat().st_size, rel=0.02)


# ---------------------------------------------------------------------- the command


def test_a_thousand_experts_and_a_trillion_parameters_are_planned_in_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--experts", 1000, "--layers", 24, "--embed-dim", 4096, "--ffn-dim", 10240, "--heads", 8]
    machine = ["--decoder-attention-heads", 32, "--vocab-size", 32000, "--ranks", 4000, "--ep", 1000]
    start = time.process_time()
    _, xmoe, mhmoe = plan_json(tmp_path / "a.json", *flags, *machine, "--budget", "flops", "--mhmoe-precision", "bf16")
    assert time.process_time() - start < 20
    assert xmoe["total_params"] > 1e12 and mhmoe["total_params"] > 1e12
    # The budget asks for 9,996 experts; 1,000 ranks can share 10,000.
    assert mhmoe["num_experts"] == 10_000 and mhmoe["ranks"]["experts"] == 10
    assert "--mhmoe-budget none --moe-ffn-dim 8192 --moe-expert-count 10000" in capsys.readouterr().out
    assert mhmoe["flops_per_token"] == pytest.approx(xmoe["flops_per_token"], rel=0.01)
    for row in (xmoe, mhmoe):
        assert row["ranks"]["parameters"]["expert"] * 1000 == row["expert_params"]
        assert row["ranks"]["traffic"]["rows"] * row["ranks"]["traffic"]["row_bytes"] == 4096 * 2 * 4096 * 2
    assert mhmoe["ranks"]["traffic"]["rows"] == 8 * xmoe["ranks"]["traffic"]["rows"]


def test_the_tables_have_a_column_for_every_model(capsys: pytest.CaptureFixture) -> None:
    words = "--arch mhmoe_lm_tiny --experts 8 16 --vocab-size 500 --ranks 8 --tflops 100 --checkpoint-activations"
    assert main(["plan", *words.split()]) == 0
    text = capsys.readouterr().out
    for title in ("memory", "time of one micro-batch"):
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {title} ")]
        assert [cell.strip() for cell in line.split("|")[2:-1]] == ["dense", "xmoe 8", "xmoe 16", "mhmoe 8", "mhmoe 16"]
    assert re.search(r"EP x DP +\| +1 x 8 \| +8 x 1 \| +8 x 1 ", text)
    assert re.search(r"directions: .*\| 2 \+ 2 \+ 2 \|", text) and "computing, at --tflops" in text


def test_precision_and_recomputing_reach_the_dense_model_too(tmp_path: Path) -> None:
    words = ["--arch", "mhmoe_lm_tiny", "--vocab-size", 500, "--ranks", 8]
    dense, *_ = plan_json(tmp_path / "a.json", *words)
    half, *_ = plan_json(tmp_path / "b.json", *words, "--mhmoe-precision", "bf16", "--checkpoint-activations")
    assert half["ranks"]["activations"] < dense["ranks"]["activations"]
    assert half["ranks"]["activations_recomputed"] < half["ranks"]["activations"]
    assert half["ranks"]["train_flops"] * 3 == dense["ranks"]["train_flops"] * 4


@pytest.mark.parametrize(
    "words, message",
    [
        (["--ranks", "0"], r"--ranks \(0\) must be at least 1"),
        (["--ranks", "12"], r"--ranks-per-node \(8\) must divide --ranks \(12\)"),
        (["--ranks", "8", "--ep", "3"], r"--mhmoe-expert-parallel-size \(3\) must divide the number of experts \(8\)"),
        (["--ranks", "4", "--ep", "8"], r"--mhmoe-expert-parallel-size \(8\) must divide --ranks \(4\)"),
        (["--ep", "8"], "needs --ranks"),
        (["--ranks", "8", "--network", "0"], r"--network \(0\) must be positive"),
        (["--ranks", "8", "--tokens-per-rank", "0"], r"--tokens-per-rank \(0\) must be at least 1"),
    ],
)
def test_bad_input_is_one_line_and_status_2(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", "--arch", "mhmoe_lm_tiny", "--vocab-size", "500", *words]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


TOKENS = ROWS * LENGTH
CASES = [
    ("mhmoe_lm_tiny", {"mhmoe_budget": "none"}),
    ("mhmoe_lm_tiny", {"mhmoe_budget": "none", "moe_freq": 1, "checkpoint_activations": True}),
    ("mhmoe_lm_tiny", {"mhmoe_budget": "none", "mhmoe_precision": "bf16", "mhmoe_heads_number": 8}),
    ("xmoe_lm_tiny", {"moe_top_k": 1}),
    ("smoe_lm_tiny", {}),
]


@pytest.fixture
def workers(request: pytest.FixtureRequest, ranks: int):
    return request.getfixturevalue(f"workers{ranks}")


@pytest.mark.parametrize("ranks, size", [(2, 2), (4, 4), (4, 2)], ids=["EP2", "EP4", "EP2xDP2"])
@pytest.mark.parametrize("arch, flags", CASES, ids=str)
def test_rows_and_bytes_are_those_that_were_counted(
    workers: Any, ranks: int, size: int, arch: str, flags: dict[str, Any]
) -> None:
    shape = shape_of(build_on_meta(options_of(arch, flags), small_dictionary()))
    cluster = Cluster(ranks=ranks, ranks_per_node=ranks, tokens=TOKENS, link=1e9, network=1e9)
    plan = exchange(shape.moe, cluster, size, element=2 if shape.half else 4, recompute=shape.recompute)
    measured = workers.run(measure, arch, size, flags)
    for rank, one in enumerate(measured):
        # Per layer and direction, the rank's own rows included: exact whatever the router did.
        assert [rows for rows, _ in one.traffic] == [plan.rows] * shape.moe_layers
        assert one.counter.calls == plan.transfers * shape.moe_layers
        assert one.counter.count_bytes == plan.count_bytes * plan.count_transfers * shape.moe_layers
        # Off-rank bytes follow from the logged loads, exactly; the plan has their expectation.
        own = slice(rank % size * shape.moe.num_experts // size, (rank % size + 1) * shape.moe.num_experts // size)
        for (_, sent), load in zip(one.traffic, one.load):
            assert sent == int(load.sum() - load[own].sum()) * plan.row_bytes
    # What all ranks send is what all receive, so every direction moves as many rows.
    total_rows = sum(one.counter.rows for one in measured)
    assert total_rows == ranks * plan.rows * plan.transfers * shape.moe_layers
    counted = sum(sent for one in measured for _, sent in one.traffic)
    expected = ranks * shape.moe_layers * plan.off_rank
    print(f"{arch} {size} of {ranks} ranks: off-rank bytes {counted:,}, expected under uniform routing {expected:,.0f}")
    assert 0.5 * expected < counted < 1.5 * expected


HEADS = {"mhmoe_budget": "none", "mhmoe_expert_banks": "per-head", "mhmoe_heads_number": 4, "moe_freq": 1}


@pytest.mark.parametrize("more", [{"moe_top_k": 1}, {"moe_top_k": 4, "checkpoint_activations": True}], ids=str)
def test_what_shared_out_heads_send_and_keep_is_planned_whatever_k(workers2: Any, more: dict[str, Any]) -> None:
    flags = {**HEADS, **more}
    shape = shape_of(build_on_meta(options_of("mhmoe_lm_tiny", flags), small_dictionary()))
    cluster = Cluster(ranks=2, ranks_per_node=2, tokens=TOKENS, link=1e9, network=1e9)
    plan = exchange(shape.moe, cluster, 2, element=4, recompute=shape.recompute, by="heads")
    assert (plan.bytes, plan.off_rank) == (TOKENS * 32 * 4, TOKENS * 16 * 4)
    measured = workers2.run(measure, "mhmoe_lm_tiny", 2, flags, "heads")
    statistics = (3 * shape.moe.total_experts // 2 + 4) * 4  # of probabilities there is a gradient, too
    beside = (plan.count_bytes - 8) * plan.count_transfers + statistics
    for one in measured:
        assert one.traffic == [(plan.rows, plan.off_rank)] * shape.moe_layers
        assert one.counter.bytes == shape.moe_layers * (plan.transfers * plan.off_rank + beside)
        assert one.counter.count_bytes == shape.moe_layers * plan.count_transfers * 8
    if not shape.recompute:
        planned = ActivationMemory(shape, "loop", exchanged=False, cpu=True).kept()
        kept = sum(one.kept for one in measured) / 2 / TOKENS + 4 * shape.settings.decoder_embed_dim
        kept += shape.moe_layers * shape.moe.subtokens_per_token * shape.moe.top_k * 2 * 8  # the order of the rows
        assert planned == pytest.approx(kept, rel=0.05)


def test_the_plan_of_heads_on_many_ranks(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = "--arch mhmoe_lm_base --vocab-size 500 --ranks 16 --experts 16 --heads 8 --budget none "
    words += "--mhmoe-expert-banks per-head"
    by_k = []
    for top_k in (1, 4):
        heads = "--mhmoe-parallel", "heads", "--top-k", top_k
        _, reference, planned = plan_json(tmp_path / "plan.json", *words.split(), *heads)
        by_k.append(planned["ranks"]["traffic"])
        assert planned["ranks"]["size"] == 8 and planned["ranks"]["experts"] == 16  # a head on each rank
        assert reference["ranks"]["traffic"]["by"] == "experts"
    assert by_k[0] == by_k[1] and by_k[0]["rows"] * by_k[0]["row_bytes"] == 4096 * 768 * 4
    assert "slices of tokens, one for each rank" in capsys.readouterr().out
    assert main(["plan", *words.split(), "--mhmoe-parallel", "heads", "--ep", "16"]) == 2
    assert "--mhmoe-expert-parallel-size (16) must divide the number of heads (8)" in capsys.readouterr().err


@pytest.mark.parametrize("arch, flags", CASES[:1] + CASES[2:], ids=str)
def test_activation_memory_of_a_rank(workers2: Any, arch: str, flags: dict[str, Any]) -> None:
    shape = shape_of(build_on_meta(options_of(arch, flags), small_dictionary()))
    planned = ActivationMemory(shape, "loop", exchanged=True, cpu=True).kept()
    measured = sum(one.kept for one in workers2.run(measure, arch, 2, flags)) / 2 / TOKENS
    measured += shape.moe_layers * shape.moe.subtokens_per_token * shape.moe.top_k * 2 * 8  # the order of the rows
    measured += 4 * shape.settings.decoder_embed_dim  # a gradient that is computed with the loss
    assert planned == pytest.approx(measured, rel=0.05)


def test_the_workers_differ(workers2: Any) -> None:
    first, second = workers2.run(measure, "mhmoe_lm_tiny", 2, {"mhmoe_budget": "none"})
    assert not torch.equal(first.load[0], second.load[0])
