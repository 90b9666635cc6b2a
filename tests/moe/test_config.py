"""Validation, counting against the built module, and the two budgets."""

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
    inactive = expert_params * (config.num_experts - config.top_k) // config.num_experts
    assert config.num_active_params() == config.num_params() - inactive


@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_equal_a_profiler_count(variant):
    from torch.utils.flop_counter import FlopCounterMode

    layer = build(backend="loop", **VARIANTS[variant])
    tokens = 6
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.randn(tokens, 24, dtype=torch.float64))
    assert counter.get_total_flops() == tokens * layer.config.flops_per_token()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_heads": 5}, r"num_heads \(5\) must divide embed_dim \(24\)"),
        ({"top_k": 6}, r"top_k \(6\) must be at most num_experts \(5\)"),
        ({"top_k": 0}, r"top_k \(0\) must be an integer of at least 1"),
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
        ({"num_projection_layers": -1}, r"num_projection_layers \(-1\) must be an integer of at least 0"),
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
