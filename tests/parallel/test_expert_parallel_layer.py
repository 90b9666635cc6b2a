"""A layer whose experts live on several ranks against the same layer in one process: outputs and every gradient."""

import random

import pytest
import torch
from layer_cases import FIELDS, Case, Result, merge_gradients, run_alone, run_ranks

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}

VARIANTS = {
    "plain": {},
    "one_head": {"num_heads": 1},
    "one_expert_each": {"num_experts": 4, "top_k": 1},
    "all_experts": {"top_k": 8},
    "linear_router": {"router": "linear", "num_heads": 1},
    "cosine_router": {"router_normalize": "both", "router_temperature": 0.3},
    "swiglu_subln": {"activation": "swiglu", "expert_layernorm": True, "expert_bias": False},
    "relu": {"activation": "relu", "normalize_gates": False},
    "shared_deep": {"shared_expert_dim": 20, "num_projection_layers": 3},
    "residual_no_split": {"subtoken_residual": True, "split": False},
    "topk_balance": {"balance_assignment": "topk"},
    "latent": {"latent_dim": 16, "num_heads": 1, "router_input": "token"},
    "banks": {"expert_banks": "per-head", "num_experts": 5},
    "banks_global": {"expert_banks": "per-head", "num_experts": 3, "balance_scope": "global", "latent_dim": 32},
    "banks_capacity": {"expert_banks": "per-head", "num_experts": 3, "routing": "capacity", "capacity_factor": 0.7},
    "capacity": {"routing": "capacity"},
    "capacity_top1": {"routing": "capacity", "top_k": 1, "capacity_factor": 0.5, "num_heads": 1, "router": "linear"},
    "capacity_before": {"routing": "capacity", "normalize_before_dropping": True, "capacity_factor": 0.7},
    "global": {"balance_scope": "global"},
    "biased": {"balancing": "quantile", "gate_score": "sigmoid"},
    "relu_routing": {"routing": "relu"},
    "relu_banks": {"routing": "relu", "expert_banks": "per-head", "num_experts": 5},
    "expert_choice": {"routing": "expert-choice"},
    "swiglu7_stable": {"activation": "swiglu7", "merge_norm": True},
    "quantized": {"quantize_experts": True, "shared_expert_dim": 20},
    "domains": {"router": "domain", "num_heads": 1, "top_k": 1},
    "global_topk": {"balance_scope": "global", "balance_assignment": "topk"},
    "global_gates": {"balance_scope": "global", "balance_assignment": "gates"},
}


def variants(world_size: int, everything: bool = False) -> list[Case]:
    """Each variant in float64 with padding and in float32 without; with ``everything`` all four."""
    tokens, padded = (7, 4, 9, 5)[:world_size], tuple(range(world_size))
    kinds = [(padded, torch.float64), (None, torch.float32)]
    if everything:
        kinds += [(None, torch.float64), (padded, torch.float32)]
    return [Case(tokens, pads, dtype, fields=fields) for fields in VARIANTS.values() for pads, dtype in kinds]


def assert_close(actual, expected, tolerance, what):
    # A gradient that is zero in exact arithmetic is rounding noise in both: measure it on the inputs' scale.
    scale = max(float(expected.abs().max()) if expected.numel() else 0.0, 1e-3)
    error = float((actual - expected).abs().max()) / scale if expected.numel() else 0.0
    assert actual.shape == expected.shape and error <= tolerance, (what, error)


def assert_equals_one_process(case: Case, ranks: list[Result], size: int) -> None:
    tolerance = TOLERANCE[case.dtype]
    alone = run_alone(case)
    for rank, (got, want) in enumerate(zip(ranks, alone)):
        assert_close(got.hidden, want.hidden, tolerance, (case, rank, "hidden"))
        assert_close(got.losses, want.losses, tolerance, (case, rank, "losses"))
        assert_close(got.x_grad, want.x_grad, tolerance, (case, rank, "x"))
    if alone[0].evidence is not None:  # counts, which processes add up
        assert torch.equal(*(sum(result.evidence for result in results) for results in (ranks, alone)))
    merged = merge_gradients([result.grads for result in ranks], size)
    for name, expected in alone[0].grads.items():
        assert_close(merged[name], expected, tolerance, (case, name))


def assert_all_equal_one_process(workers, cases: list[Case], size: int) -> None:
    by_rank = workers.run(run_ranks, cases, size)
    for case, results in zip(cases, zip(*by_rank)):
        assert_equals_one_process(case, list(results), size)


def test_two_ranks_equal_one_process(workers2):
    assert_all_equal_one_process(workers2, variants(2), size=2)


@pytest.mark.parametrize("size", [4, 2])
def test_four_ranks_equal_one_process(workers4, size):
    assert_all_equal_one_process(workers4, variants(4), size)


def test_the_global_scope_works_where_every_rank_has_all_experts(workers4):
    cases = [case for case in variants(4) if case.config.balance_scope == "global"]
    assert_all_equal_one_process(workers4, cases, size=1)


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, 2, 1])
def test_everything_on_four_ranks_equals_one_process(workers4, size):
    assert_all_equal_one_process(workers4, variants(4, everything=True), size)


def random_case(seed: int, world_size: int) -> Case:
    draw = random.Random(seed)
    experts = world_size * draw.randint(1, 4)
    routing = draw.choice(["dropless", "dropless", "capacity"])
    fields = {
        "num_heads": draw.choice([1, 2, 3, 4, 6]),
        "num_experts": experts,
        "top_k": draw.choice([1, draw.randint(1, experts), experts]),
        "expert_ffn_dim": draw.randint(4, 20),  # a LayerNorm over fewer lets nothing but rounding through
        "activation": draw.choice(["gelu", "relu", "swiglu"]),
        "router": draw.choice(["linear", "xmoe"]),
        "expert_layernorm": draw.random() < 0.3,
        "expert_bias": draw.random() < 0.7,
        "routing": routing,
        "balance_scope": draw.choice(["rank", "global"]) if routing == "dropless" else "rank",
        "balance_assignment": draw.choice(["top1", "topk"]),
        "shared_expert_dim": draw.choice([0, 0, 5]),
        "expert_banks": draw.choice(["shared", "shared", "per-head"]),
    }
    tokens = tuple(draw.choice([0, 1, draw.randint(1, 12)]) for _ in range(world_size))
    padded = tuple(draw.choice([0, count, draw.randint(0, count)]) for count in tokens) if draw.random() < 0.6 else None
    return Case(
        tokens, padded, seed=seed, fields=fields, backend=draw.choice(["loop", "blocked"]),
        training=draw.random() < 0.7, router_scale=draw.choice([1.0, 1.0, 50.0]),
    )  # fmt: skip


def test_random_layers_on_two_ranks(workers2):
    cases = [random_case(seed, 2) for seed in range(60)]
    assert any(0 in case.tokens for case in cases)
    assert_all_equal_one_process(workers2, cases, size=2)


@pytest.mark.parametrize("size", [4, 2])
def test_random_layers_on_four_ranks(workers4, size):
    assert_all_equal_one_process(workers4, [random_case(seed, 4) for seed in range(100, 140)], size)


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, 2, 1])
def test_many_random_layers_on_four_ranks(workers4, size):
    assert_all_equal_one_process(workers4, [random_case(seed, 4) for seed in range(1000, 1150)], size)


def test_rows_and_bytes_are_those_counted_by_hand(workers2):
    cases = [Case((6, 5), (2, 0)), Case((0, 5)), Case((6, 5), dtype=torch.float32, fields={"top_k": 3})]
    by_rank = workers2.run(run_ranks, cases, 2)
    share = FIELDS["num_experts"] // 2
    for number, case in enumerate(cases):
        for rank, results in enumerate(by_rank):
            result = results[number]
            real = case.tokens[rank] - (case.padded[rank] if case.padded else 0)
            rows = real * 4 * case.config.top_k
            assert result.load.sum() == rows
            away = rows - int(result.load[rank * share :][:share].sum())
            row_bytes = 24 // 4 * case.dtype.itemsize
            assert result.traffic == (rows, away * row_bytes)
            # Really sent: rows there, the others' results back; both again in the backward.
            come = [int(other[number].load[rank * share :][:share].sum()) for other in by_rank]
            calls, sent, sent_bytes = result.counted
            assert calls == 4 and sent == 2 * (rows + sum(come))
            assert sent_bytes == 2 * (away + sum(come) - come[rank]) * row_bytes
