"""A layer whose heads live on several ranks against the same layer in one process, and what it sends."""

import pytest
import torch
from layer_cases import Case, run_ranks
from test_expert_parallel_layer import assert_all_equal_one_process, assert_equals_one_process

from mhmoe_fairseq.moe import ConfigError
from mhmoe_fairseq.moe.head_parallelism import of_one_process

VARIANTS = {
    "plain": {},
    "latent": {"latent_dim": 32, "router": "linear", "top_k": 1},
    "no_projections": {"num_projection_layers": 0, "subtoken_residual": True},
    "all_experts": {"top_k": 3, "balance_assignment": "gates", "gate_score": "sigmoid", "gate_scale": 2.5},
    "swiglu_shared": {"activation": "swiglu", "expert_layernorm": True, "shared_expert_dim": 20},
    "balanced": {"router": "balanced"},
    "global": {"balance_scope": "global", "router_normalize": "both", "router_temperature": 0.3},
    "biased": {"balancing": "quantile", "gate_score": "sigmoid", "router": "linear"},
    "biased_global": {"balancing": "bias-sign", "balance_scope": "global", "top_k": 1},
    "magi2": {"balancing": "bias-sign", "activation": "swiglu7", "merge_norm": True, "shared_expert_dim": 20},
    "relu": {"routing": "relu"},
    "expert_choice": {"routing": "expert-choice"},
    "capacity": {"routing": "capacity", "capacity_factor": 0.6, "normalize_before_dropping": True},
}


def variants(world_size: int) -> list[Case]:
    """Each with padding and without, on ranks with unlike numbers of tokens, one of them with none."""
    return [
        Case(
            tokens[:world_size],
            padded and padded[:world_size],
            by="heads",
            fields={"expert_banks": "per-head", "num_experts": 3, **fields},
        )  # fmt: skip
        for fields in VARIANTS.values()
        for tokens, padded in (((7, 4, 9, 5), (0, 4, 2, 3)), ((3, 0, 5, 2), None))
    ]


def test_two_ranks_equal_one_process(workers2) -> None:
    assert_all_equal_one_process(workers2, variants(2), size=2)


@pytest.mark.parametrize("size", [4, 2])
def test_four_ranks_equal_one_process(workers4, size: int) -> None:
    assert_all_equal_one_process(workers4, variants(4), size)


def test_statistics_are_of_each_ranks_own_tokens_and_traffic_is_of_no_choice(workers2) -> None:
    fields = {"expert_banks": "per-head", "num_experts": 6}
    cases = [Case((7, 4), by=by, fields={**fields, "top_k": top_k}) for top_k in (1, 4) for by in ("heads", "experts")]
    by_case = list(zip(*workers2.run(run_ranks, cases, 2)))
    for heads, experts in zip(by_case[::2], by_case[1::2]):
        for one, other in zip(heads, experts):
            assert torch.equal(one.load, other.load)
    for results in (by_case[0], by_case[2]):
        # A row of half a token, 12 numbers of float64, to each rank.
        assert [result.traffic for result in results] == [(14, 7 * 12 * 8), (8, 4 * 12 * 8)]
    assert by_case[1][0].traffic[0] == 28 and by_case[3][0].traffic[0] == 112  # sub-tokens times K
    assert_equals_one_process(cases[0], list(by_case[0]), 2)


def test_heads_that_cannot_be_shared_out_are_refused() -> None:
    config = Case((1,), fields={"expert_banks": "per-head"}).config
    with pytest.raises(ConfigError, match=r"num_heads \(4\) must be a multiple of 3, the processes that share heads"):
        of_one_process(config, 3)
    with pytest.raises(ConfigError, match=r"expert_banks \('shared'\) must be 'per-head'"):
        of_one_process(Case((1,)).config, 2)
