"""Validation, counting against the built module, and the two budgets."""

import dataclasses

import pytest
import torch
from test_layer import VARIANTS, build

from mhmoe_fairseq.moe import MHMoEConfig, MHMoELayer

BASE = {"embed_dim": 24, "num_heads": 4, "num_experts": 5, "top_k": 2, "expert_ffn_dim": 16}


@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_equal_the_built_module(variant):
    layer = build(**VARIANTS[variant])
    config = layer.config
    assert config.num_params() == sum(p.numel() for p in layer.parameters())
    expert_params = sum(p.numel() for p in layer.experts.parameters())
    inactive = expert_params * (config.num_experts - config.top_k) // config.num_experts  # of every bank
    assert config.num_active_params() == config.num_params() - inactive


@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_equal_a_profiler_count(variant):
    from torch.utils.flop_counter import FlopCounterMode

    layer = build(backend="loop", **VARIANTS[variant])
    tokens = 6
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        load = layer(torch.randn(tokens, 24, dtype=torch.float64)).stats.expert_load.sum().item()
    config = layer.config
    more = load - tokens * config.subtokens_per_token * config.top_k  # than planned, where logits say how many
    of_expert = 2 * config.matrices_per_expert * config.subtoken_dim * config.expert_ffn_dim
    assert counter.get_total_flops() == tokens * config.flops_per_token() + more * of_expert
    assert more == 0 or config.routing == "relu"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_heads": 5}, r"num_heads \(5\) must divide embed_dim \(24\)"),
        ({"top_k": 6}, r"top_k \(6\) must be at most num_experts \(5\)"),
        ({"top_k": 0}, r"top_k \(0\) must be at least 1, an integer"),
        ({"router": "softmax"}, r"router \('softmax'\) must be one of linear, xmoe"),
        ({"routing": "dropping"}, r"routing \('dropping'\) must be one of dropless, capacity"),
        ({"activation": "tanh"}, r"activation \('tanh'\) must be one of gelu, relu, swiglu"),
        ({"second_expert_policy": "random", "top_k": 1}, r"second_expert_policy \('random'\) needs top_k 2"),
        ({"router": "linear", "router_temperature": 0.3}, r"router_temperature \(0.3\) needs the xmoe router"),
        ({"router": "linear", "router_normalize": "both"}, r"router_normalize \('both'\) needs the xmoe router"),
        ({"router_temperature": -1.0}, r"router_temperature \(-1.0\) must be positive"),
        ({"dropout": 1.0}, r"dropout \(1.0\) must be in \[0, 1\)"),
        ({"capacity_factor": 0.0}, r"capacity_factor \(0.0\) must be positive"),
        ({"num_projection_layers": 0, "head_projection": True}, r"num_projection_layers \(0\) is 0, but"),
        ({"latent_dim": 0}, r"latent_dim \(0\) must be at least 1, an integer"),
        ({"latent_dim": 18}, r"num_heads \(4\) must divide latent_dim \(18\)"),
        ({"merge_norm": True, "num_heads": 1}, r"merge_norm \(True\) needs merge_projection"),
        ({"latent_dim": 16, "merge_projection": False}, r"latent_dim \(16\) differs from embed_dim \(24\), which"),
        ({"latent_dim": 16, "num_projection_layers": 0}, r"latent_dim \(16\) differs from embed_dim \(24\), which"),
        ({"router_input": "token"}, r"router_input \('token'\) needs one sub-token per token; num_heads is 4"),
        ({"expert_banks": "per-head", "split": False}, r"expert_banks \('per-head'\) needs sub-tokens; split is"),
        ({"expert_banks": "own"}, r"expert_banks \('own'\) must be one of shared, per-head"),
        ({"num_projection_layers": -1}, r"num_projection_layers \(-1\) must be at least 0, an integer"),
    ],
)
def test_wrong_values_name_field_value_and_rule(change, message):
    with pytest.raises(ValueError, match=message):
        MHMoEConfig(**{**BASE, **change})


def reference(experts, **changes):
    return MHMoEConfig(embed_dim=768, num_experts=experts, expert_ffn_dim=3072, **changes)


@pytest.mark.parametrize(
    "experts, width", [(8, 11_832), (16, 12_024), (32, 12_120), (64, 12_168), (128, 12_192), (256, 12_200)]
)
def test_params_budget_gives_table_11_widths(experts, width):
    target = reference(experts, expert_layernorm=True)
    matched = MHMoEConfig.matching(target, budget="params", num_heads=4)
    assert matched.expert_ffn_dim == width
    assert -0.005 <= matched.budget_gap(target).params <= 0


@pytest.mark.parametrize("heads, top_k, width, experts", [(2, 2, 768, 41), (3, 3, 512, 93)])
def test_flops_budget_gives_paper_2s_cases(heads, top_k, width, experts):
    target = MHMoEConfig(
        embed_dim=768, num_experts=8, expert_ffn_dim=2048, top_k=1, router="linear",
        activation="swiglu", expert_bias=False, projection_bias=False,
    )  # fmt: skip
    matched = MHMoEConfig.matching(target, budget="flops", num_heads=heads, top_k=top_k)
    assert (matched.expert_ffn_dim, matched.num_experts) == (width, experts)
    gap = matched.budget_gap(target)
    assert abs(gap.params) < 0.01 and abs(gap.flops) < 0.02
    rounded = MHMoEConfig.matching(target, budget="flops", num_heads=heads, top_k=top_k, expert_multiple=8)
    assert rounded.num_experts == {2: 40, 3: 96}[heads]


def test_flops_budget_keeps_both_counts_of_a_gelu_reference():
    target = reference(8)
    matched = MHMoEConfig.matching(target, budget="flops", num_heads=4)
    gap = matched.budget_gap(target)
    # Half an expert is what rounding their number may cost; the routers differ by a little.
    assert abs(gap.params) < 0.5 / matched.num_experts + 0.002 and abs(gap.flops) < 0.01


def flops_reference(**changes):
    fields = {"embed_dim": 64, "num_experts": 4, "expert_ffn_dim": 200, "top_k": 2, **changes}
    return MHMoEConfig(**fields)


@pytest.mark.parametrize("width", range(160, 290, 10))
@pytest.mark.parametrize("multiple, experts_multiple", [(8, 1), (32, 1), (64, 4)])
def test_flops_budget_rounds_to_the_nearest(width, multiple, experts_multiple):
    target = flops_reference(expert_ffn_dim=width)
    matched = MHMoEConfig.matching(
        target, budget="flops", num_heads=2, multiple_of=multiple, expert_multiple=experts_multiple
    )
    # Two projections of 64 x 64 are 32 of the 2 x width rows that a token's experts have; sub-tokens are 32 wide.
    assert matched.expert_ffn_dim == multiple * round((2 * width - 64) / 2 / multiple)
    available = 2 * 64 * width * 4 - 2 * 64 * 64
    nearest = experts_multiple * round(available / (2 * 32 * matched.expert_ffn_dim) / experts_multiple)
    assert matched.num_experts == max(nearest, experts_multiple)


def test_flops_budget_leaves_each_sub_token_its_experts():
    """Sixteen narrow experts cost a little less than the reference's one; the budget alone would give fifteen."""
    target = flops_reference(num_experts=1, top_k=1, expert_ffn_dim=1024)
    many = {"num_experts": 16, "split": False}
    matched = MHMoEConfig.matching(target, budget="flops", num_heads=2, top_k=16, multiple_of=64, **many)
    assert (matched.expert_ffn_dim, matched.num_experts, matched.top_k) == (64, 16, 16)
    wide = MHMoEConfig.matching(flops_reference(num_experts=2), budget="flops", num_heads=2, expert_multiple=32)
    assert wide.num_experts == 32


@pytest.mark.parametrize("heads, bias", [(1, 6 * 2 * 64), (4, 6 * 2 * 16)])
def test_finer_experts_have_as_many_weights_and_products(heads, bias):
    fields = {"embed_dim": 64, "num_experts": 6, "top_k": 2, "expert_ffn_dim": 48, "router": "linear"}
    layer = MHMoEConfig(num_heads=heads, **fields)
    finer = layer.finer(3)
    assert (finer.num_experts, finer.top_k, finer.expert_ffn_dim) == (18, 6, 16)
    # Scores of 12 more experts for each sub-token, and output biases.
    assert finer.num_params() - layer.num_params() == 64 // heads * 12 + bias
    assert finer.flops_per_token() - layer.flops_per_token() == 2 * 64 * 12
    with pytest.raises(ValueError, match=r"granularity \(5\) must divide expert_ffn_dim \(48\)"):
        layer.finer(5)


def test_params_budget_takes_the_widest_that_fits():
    target = reference(8)
    matched = MHMoEConfig.matching(target, budget="params", num_heads=4)
    wider = dataclasses.replace(matched, expert_ffn_dim=matched.expert_ffn_dim + 8)
    assert matched.num_params() <= target.num_params() < wider.num_params()
    single = MHMoEConfig.matching(target, budget="params", num_heads=4, multiple_of=1)
    assert single.num_params() <= target.num_params()
    wider = dataclasses.replace(single, expert_ffn_dim=single.expert_ffn_dim + 1)
    assert wider.num_params() > target.num_params()


def test_impossible_budgets_are_refused():
    narrow = MHMoEConfig(embed_dim=768, num_experts=2, expert_ffn_dim=64, top_k=1)
    with pytest.raises(ValueError, match="projections alone cost more"):
        MHMoEConfig.matching(narrow, budget="flops", num_heads=4)
    with pytest.raises(ValueError, match="no expert_ffn_dim that is a multiple of 512"):
        MHMoEConfig.matching(reference(8), budget="params", num_heads=4, multiple_of=512)
    with pytest.raises(ValueError, match=r"budget \('time'\) must be one of params, flops"):
        MHMoEConfig.matching(reference(8), budget="time", num_heads=4)


def test_one_head_is_the_baseline_without_projections():
    config = MHMoEConfig(**{**BASE, "num_heads": 1})
    layer = MHMoELayer(config)
    assert layer.head_projection is None and layer.merge_projection is None
    assert config.subtoken_dim == config.embed_dim


def test_layer_needs_neither_fairseq_nor_torchscale(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys; sys.modules.update(fairseq=None, torchscale=None, omegaconf=None)\n"
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'fairseq' else real(n, *a)\n"
        "from mhmoe_fairseq.moe import MHMoEConfig, MHMoELayer; import torch\n"
        "c = MHMoEConfig(embed_dim=8, num_heads=2, num_experts=3, expert_ffn_dim=4)\n"
        "print(tuple(MHMoELayer(c)(torch.randn(2, 3, 8)).hidden.shape))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "(2, 3, 8)", done.stderr
