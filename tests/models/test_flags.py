"""Flags to configurations: what they say, what contradicts, what has no effect."""

import logging

import pytest
from language_models import SMALL

from mhmoe_fairseq.models.architectures import architecture_options
from mhmoe_fairseq.models.flags import decoder_settings, expert_parallel_size, moe_config
from mhmoe_fairseq.moe import MHMoEConfig
from mhmoe_fairseq.moe.router import ROUTERS


def config(arch="mhmoe_lm_tiny", **flags):
    return moe_config(architecture_options(arch, **flags))


def settings(arch="mhmoe_lm_tiny", **flags):
    return decoder_settings(architecture_options(arch, **flags), vocab_size=50)


# ---------------------------------------------------------------------- what they say


def test_the_paper_base_model():
    assert config("mhmoe_lm_base") == MHMoEConfig(
        embed_dim=768,
        num_experts=8,
        expert_ffn_dim=11832,  # facts from table 11: the widest that stays below X-MoE's parameters
        num_heads=4,
        top_k=2,
        router="xmoe",
        expert_layernorm=True,
        dropout=0.1,
        gating_fp32=False,
    )


@pytest.mark.parametrize("family, router", [("smoe", "linear"), ("xmoe", "xmoe"), ("mhmoe", "xmoe")])
def test_routers_of_the_families(family, router):
    assert config(f"{family}_lm_tiny").router == router
    assert config(f"{family}_lm_tiny", mhmoe_router="arch").router == router
    assert config(f"{family}_lm_tiny", mhmoe_router="linear").router == "linear"
    assert config(f"{family}_lm_tiny", use_xmoe=True).router == "xmoe"


def test_dense_has_no_moe_layer():
    assert config("dense_lm_tiny") is None
    assert settings("dense_lm_tiny").moe_freq == 0


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({"mhmoe_heads_number": 8}, {"num_heads": 8}),
        ({"moe_expert_count": 16, "moe_top_k": 3}, {"num_experts": 16, "top_k": 3}),
        ({"moe_top1_expert": True}, {"top_k": 1}),
        ({"moe_ffn_dim": 96}, {"expert_ffn_dim": 96}),
        ({"mhmoe_budget": "none"}, {"expert_ffn_dim": 512}),
        (
            {"mhmoe_granularity": 2, "mhmoe_budget": "none"},
            {"num_experts": 16, "top_k": 4, "expert_ffn_dim": 256},
        ),
        ({"activation_fn": "relu"}, {"activation": "relu"}),
        ({"no_bias": True}, {"expert_bias": False, "projection_bias": False}),
        ({"no_subln": True}, {"expert_layernorm": False}),
        ({"rms_norm": True}, {"expert_layernorm": False}),
        ({"dropout": 0.3, "activation_dropout": 0.2}, {"dropout": 0.3, "activation_dropout": 0.2}),
        ({"moe_gating_use_fp32": True}, {"gating_fp32": True}),
        ({"mhmoe_latent_dim": 64}, {"latent_dim": 64, "subtoken_dim": 16}),
        ({"mhmoe_expert_banks": "per-head"}, {"expert_banks": "per-head", "num_banks": 4}),
        ({"mhmoe_latent_dim": 32, "mhmoe_heads_number": 1, "mhmoe_router_input": "token"}, {"router_input": "token"}),
        ({"mhmoe_subtoken_residual": True}, {"subtoken_residual": True}),
        ({"mhmoe_projection_layers": 2}, {"num_projection_layers": 2}),
        ({"mhmoe_projection_layers": 0}, {"has_head_projection": False, "has_merge_projection": False}),
        ({"mhmoe_head_projection": "off"}, {"has_head_projection": False}),
        ({"mhmoe_merge_projection": "off"}, {"has_merge_projection": False}),
        ({"mhmoe_projection_bias": "off"}, {"projection_bias": False}),
        ({"mhmoe_projection_gain": 1.5}, {"projection_gain": 1.5}),
        ({"mhmoe_no_split": True, "mhmoe_budget": "none"}, {"split": False, "subtoken_dim": 128}),
        ({"mhmoe_shared_expert_dim": 40}, {"shared_expert_dim": 40}),
        ({"mhmoe_router_dim": 12}, {"router_dim": 12}),
        ({"mhmoe_router_normalize": "both"}, {"router_normalize": "both"}),
        ({"mhmoe_router_temperature": 0.07}, {"router_temperature": 0.07}),
        ({"mhmoe_router_preset": "p1"}, {"router_dim": 4, "router_normalize": "both", "router_temperature": 0.3}),
        (
            {"mhmoe_balancing": "bias-proportional", "mhmoe_balancing_rate": 0.01},
            {"balancing": "bias-proportional", "balancing_rate": 0.01},
        ),
        ({"mhmoe_gate_score": "sigmoid", "mhmoe_gate_scale": 2.5}, {"gate_score": "sigmoid", "gate_scale": 2.5}),
        ({"mhmoe_normalize_gates": "off"}, {"normalize_gates": False}),
        ({"mhmoe_balance_assignment": "topk"}, {"balance_assignment": "topk"}),
        ({"mhmoe_balance_scope": "global"}, {"balance_scope": "global"}),
        (
            {"mhmoe_routing": "capacity", "mhmoe_capacity_factor": 1.25, "moe_eval_capacity_token_fraction": -1.0},
            {"routing": "capacity", "capacity_factor": 1.25, "eval_capacity_fraction": -1.0},
        ),
        (
            {
                "mhmoe_routing": "capacity",
                "moe_second_expert_policy": "random",
                "moe_normalize_gate_prob_before_dropping": True,
            },
            {"second_expert_policy": "random", "normalize_before_dropping": True},
        ),
    ],
)
def test_each_flag_reaches_the_layer(flags, expected):
    default, changed = config(), config(**flags)
    for field, value in expected.items():
        assert getattr(changed, field) == value, field
        assert getattr(default, field) != value, f"{field}: the default says so already"


def test_subln_survives_rms_norm_when_asked_for():
    assert config(rms_norm=True, subln=True).expert_layernorm
    assert settings(rms_norm=True, subln=True).subln and not settings(rms_norm=True).subln


def test_projections_may_keep_their_biases_without_others():
    kept = config(no_bias=True, mhmoe_projection_bias="on")
    assert kept.projection_bias and not kept.expert_bias


def test_xmoe_with_the_preset_keeps_16_dimensions():
    assert config("xmoe_lm_tiny", mhmoe_router_preset="p1").router_dim == 16


# ---------------------------------------------------------------------- budgets


def test_budgets_refer_to_the_same_flags():
    wide = config(decoder_ffn_embed_dim=1024)
    assert wide.num_params() <= config("xmoe_lm_tiny", decoder_ffn_embed_dim=1024).num_params()
    assert wide.expert_ffn_dim > 1.8 * config().expert_ffn_dim
    linear = config(mhmoe_router="linear")
    assert linear.num_params() <= config("smoe_lm_tiny").num_params()


def test_one_head_is_the_reference_under_any_budget():
    assert config("xmoe_lm_tiny", mhmoe_budget="flops") == config("xmoe_lm_tiny")


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_small_models_meet_the_budget_with_finer_widths(heads):
    reference, ours = config("xmoe_lm_tiny"), config(mhmoe_heads_number=heads)
    assert 0.995 * reference.num_params() <= ours.num_params() <= reference.num_params()
    assert config("mhmoe_lm_base", mhmoe_heads_number=heads).expert_ffn_dim % 8 == 0


def products(layer):
    """FLOPs of a token without the router's."""
    return layer.flops_per_token() - layer.subtokens_per_token * ROUTERS[layer.router].flops(layer)


def weights(layer):
    """Of experts and projections, without biases, norms and router: what the FLOPs budget keeps."""
    projections = 2 * layer.embed_dim**2 if layer.num_heads > 1 else 0
    return layer.num_experts * 2 * layer.subtoken_dim * layer.expert_ffn_dim + projections


@pytest.mark.parametrize("times", [1, 2, 4])
@pytest.mark.parametrize("budget", ["params", "flops"])
@pytest.mark.parametrize("size", ["tiny", "base"])
@pytest.mark.parametrize("family", ["xmoe", "mhmoe"])
def test_granularity_keeps_parameters_and_products(family, size, budget, times):
    reference = config(f"xmoe_lm_{size}")
    plain, ours = (config(f"{family}_lm_{size}", mhmoe_budget=budget, mhmoe_granularity=of) for of in (None, times))
    assert ours.top_k == times * reference.top_k and products(ours) == pytest.approx(products(plain), rel=0.01)
    # What rounding the number of experts may cost; biases and scores of more experts, which a parameter budget spends.
    rounding = 0.5 / plain.num_experts if budget == "flops" and family == "mhmoe" else 0
    assert ours.num_params() == pytest.approx(plain.num_params(), rel=rounding + 0.006)
    if budget == "flops":
        assert weights(ours) == pytest.approx(weights(reference), rel=0.5 / ours.num_experts + 1e-3)
        assert products(ours) == pytest.approx(products(reference), rel=0.01)
    elif family == "mhmoe":
        assert ours.num_experts == times * reference.num_experts and ours.num_params() <= reference.num_params()


@pytest.mark.parametrize("times, experts, width", [(2, 71, 224), (4, 142, 112), (16, 567, 28)])
def test_narrow_experts_are_not_rounded_coarsely(times, experts, width):
    ours = config(mhmoe_budget="flops", mhmoe_granularity=times)
    assert (ours.num_experts, ours.expert_ffn_dim) == (experts, width)


@pytest.mark.parametrize("heads, experts, width", [(2, 41, 768), (3, 93, 512)])
def test_granularity_of_as_many_as_heads_is_paper_2s_rule(heads, experts, width):
    flags = {"activation_fn": "silu", "no_bias": True, "rms_norm": True, "decoder_ffn_embed_dim": 2048, "moe_top_k": 1}
    budget = {"mhmoe_budget": "flops", "mhmoe_heads_number": heads, "mhmoe_granularity": heads}
    ours = config("mhmoe_lm_base", mhmoe_router="linear", **flags, **budget)
    assert (ours.num_experts, ours.top_k, ours.expert_ffn_dim) == (experts, heads, width)


def test_a_budget_that_no_width_meets_names_the_way_out():
    with pytest.raises(ValueError, match=r"'params'.*--mhmoe-heads-number=4.*--moe-ffn-dim"):
        config(**{**SMALL, "decoder_ffn_embed_dim": 8, "mhmoe_projection_layers": 6})


# ---------------------------------------------------------------------- contradictions


@pytest.mark.parametrize(
    "arch, flags, message",
    [
        ("mhmoe_lm_tiny", {"moe_top1_expert": True, "moe_top_k": 2}, "--moe-top1-expert contradicts --moe-top-k 2"),
        ("smoe_lm_tiny", {"use_xmoe": True, "mhmoe_router": "linear"}, "--use-xmoe contradicts --mhmoe-router linear"),
        (
            "mhmoe_lm_tiny",
            {"moe_ffn_dim": 64, "mhmoe_budget": "params"},
            r"--moe-ffn-dim \(64\).*--mhmoe-budget params",
        ),
        ("mhmoe_lm_tiny", {"moe_ffn_dim": 64, "mhmoe_budget": "flops"}, r"--moe-ffn-dim \(64\).*--mhmoe-budget flops"),
        ("dense_lm_tiny", {"mhmoe_heads_number": 4}, "--mhmoe-heads-number needs MoE layers, but the model is dense"),
        ("dense_lm_tiny", {"mhmoe_budget": "params"}, "--mhmoe-budget needs MoE layers"),
        (
            "mhmoe_lm_tiny",
            {"mhmoe_parallel": "heads"},
            r"--mhmoe-parallel \(heads\) needs --mhmoe-expert-banks per-head",
        ),
        (
            "mhmoe_lm_tiny",
            {"mhmoe_parallel": "heads", "mhmoe_expert_banks": "per-head", "mhmoe_heads_number": 1},
            r"--mhmoe-parallel \(heads\) needs .* two heads or more",
        ),
        (
            "mhmoe_lm_tiny",
            {"mhmoe_parallel": "heads", "mhmoe_expert_banks": "per-head", "mhmoe_balance_scope": "sequence"},
            r"--mhmoe-balance-scope \(sequence\) contradicts --mhmoe-parallel heads",
        ),
        ("dense_lm_tiny", {"mhmoe_granularity": 2}, "--mhmoe-granularity needs MoE layers"),
        ("xmoe_lm_tiny", {"mhmoe_granularity": 3}, r"--mhmoe-granularity \(3\) must divide --moe-ffn-dim \(512\)"),
        ("dense_lm_tiny", {"moe_freq": 2}, r"--moe-freq \(2\) contradicts a dense_\* architecture"),
        ("mhmoe_lm_tiny", {"moe_freq": 5}, r"--moe-freq \(5\) must be 0 or at most --decoder-layers \(4\)"),
        ("mhmoe_lm_tiny", {"moe_freq": -1}, r"--moe-freq \(-1\)"),
        (
            "mhmoe_lm_tiny",
            {"mhmoe_heads_number": 3},
            r"--mhmoe-heads-number \(3\) must divide --decoder-embed-dim \(128\)",
        ),
        ("mhmoe_lm_tiny", {"moe_top_k": 9}, r"--moe-top-k \(9\) must be at most --moe-expert-count \(8\)"),
        ("mhmoe_lm_tiny", {"moe_expert_count": 0}, r"--moe-expert-count \(0\)"),
        ("smoe_lm_tiny", {"mhmoe_router_temperature": 0.3}, "--mhmoe-router-temperature needs --mhmoe-router xmoe"),
        ("smoe_lm_tiny", {"mhmoe_router_preset": "p1"}, "--mhmoe-router-preset needs --mhmoe-router xmoe"),
        (
            "mhmoe_lm_tiny",
            {"mhmoe_router_preset": "p1", "mhmoe_router_dim": 8},
            "--mhmoe-router-preset sets what --mhmoe-router-dim",
        ),
        ("mhmoe_lm_tiny", {"mhmoe_capacity_factor": 2.0}, "--mhmoe-capacity-factor is about capacity"),
        (
            "mhmoe_lm_tiny",
            {"mhmoe_projection_layers": 0, "mhmoe_head_projection": "on"},
            r"--mhmoe-projection-layers \(0\)",
        ),
        (
            "mhmoe_lm_tiny",
            {"decoder_attention_heads": 5},
            r"--decoder-attention-heads \(5\) must divide --decoder-embed-dim",
        ),
        ("mhmoe_lm_tiny", {"subln": True, "no_subln": True}, "--subln and --no-subln"),
        ("mhmoe_lm_tiny", {"subln": True, "deepnorm": True}, "--subln and --deepnorm"),
        ("mhmoe_lm_tiny", {"rotary_embed": True, "xpos_rel_pos": True}, "--rotary-embed and --xpos-rel-pos"),
        (
            "mhmoe_lm_tiny",
            {"decoder_learned_pos": True, "no_token_positional_embeddings": True},
            "--decoder-learned-pos and",
        ),
        ("mhmoe_lm_tiny", {"dropout": 1.0}, r"--dropout \(1.0\) must be in \[0, 1\)"),
    ],
)
def test_contradictions_name_flag_value_and_rule(arch, flags, message):
    with pytest.raises(ValueError, match=message):
        settings(arch, **flags)


@pytest.mark.parametrize(
    "flag, value",
    [
        ("moe_eval_capacity_token_fraction", -1.0),
        ("moe_normalize_gate_prob_before_dropping", True),
        ("moe_second_expert_policy", "random"),
    ],
)
def test_capacity_flags(flag, value, caplog):
    name = "--" + flag.replace("_", "-")
    with pytest.raises(ValueError, match=f"{name} is about capacity; it contradicts dropless"):
        config(**{flag: value, "mhmoe_routing": "dropless"})
    with caplog.at_level(logging.WARNING):
        assert config(**{flag: value}).routing == "dropless"
    assert [record.message for record in caplog.records if name in record.message] == [
        f"{name} has no effect: routing is dropless (see --mhmoe-routing capacity)"
    ]


def test_lineage_flags_on_a_dense_model_are_warned_of_once_in_every_build(caplog):
    with caplog.at_level(logging.WARNING):
        assert not settings("dense_lm_tiny", moe_expert_count=8, moe_gating_use_fp32=True).moe
    assert sorted(record.message.split()[0] for record in caplog.records) == [
        "--moe-expert-count",
        "--moe-gating-use-fp32",
    ]


def test_a_sampling_policy_needs_two_experts():
    with pytest.raises(ValueError, match=r"--moe-second-expert-policy \('random'\) needs --moe-top-k 2"):
        config(mhmoe_routing="capacity", moe_second_expert_policy="random", moe_top_k=1)


# ---------------------------------------------------------------------- several processes


@pytest.mark.parametrize(
    "experts, asked, world_size, expected",
    [(8, None, 1, 1), (8, None, 4, 4), (8, None, 12, 4), (8, None, 3, 1), (12, None, 8, 4), (8, 2, 8, 2)],
)
def test_experts_are_spread_as_far_as_possible_unless_told(experts, asked, world_size, expected):
    assert expert_parallel_size(experts, asked, world_size) == expected


@pytest.mark.parametrize(
    "size, world_size, message",
    [
        (3, 3, r"--mhmoe-expert-parallel-size \(3\) must divide the number of experts \(8\)"),
        (4, 6, r"--mhmoe-expert-parallel-size \(4\) must divide the number of processes \(6\)"),
        (2, 1, r"--mhmoe-expert-parallel-size \(2\) must divide the number of processes \(1\)"),
        (0, 2, r"--mhmoe-expert-parallel-size \(0\) must be at least 1"),
    ],
)
def test_a_size_that_divides_unevenly_is_refused(size, world_size, message):
    with pytest.raises(ValueError, match=message):
        expert_parallel_size(8, size, world_size)
