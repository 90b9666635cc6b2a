"""Families that are other layers' names for settings: the papers' counts, and the budget of their reference."""

import dataclasses

import pytest
import torch
from language_models import small_model

from mhmoe_fairseq.models.architectures import FAMILIES, KINDS, REFERENCES, SIZES, architecture_options
from mhmoe_fairseq.models.flags import decoder_settings, moe_config
from mhmoe_fairseq.moe import MHMoEConfig

FINE_GRAINED = ("deepseekmoe", "olmoe")
RAW_LINEAR = {"router": "linear", "normalize_gates": False, "expert_bias": False}


def config(arch: str, **flags) -> MHMoEConfig:
    found = moe_config(architecture_options(arch, **flags))
    assert found is not None
    return found


@pytest.mark.parametrize(
    "arch, flags, sizes, params",
    [  # experts, top-k, their width, the shared expert's
        ("deepseekmoe_lm_base", {}, (31, 7, 768, 768), 37_869_312),
        ("deepseekmoe_beit3_base", {"mhmoe_shared_experts": 2}, (30, 6, 768, 1536), 37_866_240),
        ("deepseekmoe_lm_base", {"mhmoe_granularity": 2}, (15, 3, 1536, 1536), 37_843_200),
        ("deepseekmoe_lm_tiny", {}, (31, 7, 128, 128), 1_068_672),
        ("deepseekmoe_lm_tiny", {"moe_expert_count": 16, "moe_top1_expert": True}, (63, 3, 128, 128), None),
        ("deepseekmoe_lm_tiny", {"moe_ffn_dim": 64, "mhmoe_shared_experts": 0}, (32, 8, 16, 0), None),
        ("olmoe_lm_base", {}, (32, 8, 768, 0), 37_871_616),
        ("olmoe_lm_base", {"moe_expert_count": 16}, (64, 8, 768, 0), None),  # the paper's experts
    ],
)
def test_sizes_follow_from_the_references(arch: str, flags: dict, sizes: tuple, params: int | None) -> None:
    found = config(arch, **flags)
    assert (found.num_experts, found.top_k, found.expert_ffn_dim, found.shared_expert_dim) == sizes
    assert params in (None, found.num_params())
    assert (found.router, found.normalize_gates, found.balance_assignment, found.num_heads) == (
        "linear", False, "topk", 1,
    )  # fmt: skip


@pytest.mark.parametrize("family", FINE_GRAINED)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_budget_of_the_reference(family: str, kind: str, size: str) -> None:
    ours, reference = config(f"{family}_{kind}_{size}"), config(f"{REFERENCES[family]}_{kind}_{size}")
    plain = {"router": "linear", "expert_bias": False, "expert_layernorm": False}
    bare, bare_reference = (dataclasses.replace(of, **plain) for of in (ours, reference))
    router = ours.num_router_params(), reference.num_router_params()
    assert bare.num_params() - router[0] == bare_reference.num_params() - router[1]  # matrices are exactly as many
    assert bare.flops_per_token() - 2 * router[0] == bare_reference.flops_per_token() - 2 * router[1]
    assert 0 < ours.budget_gap(reference).params < 0.015 and 0 < ours.budget_gap(reference).flops < 0.02


def test_every_reference_is_a_family_without_one() -> None:
    assert set(REFERENCES) < set(FAMILIES) and not set(REFERENCES) & set(REFERENCES.values())


def test_deepseekmoe_2b_has_the_papers_experts() -> None:
    reference = MHMoEConfig(embed_dim=1280, num_experts=16, top_k=2, expert_ffn_dim=5120, **RAW_LINEAR)
    layer = reference.finer(4).sharing(1)
    assert (layer.num_experts, layer.top_k, layer.expert_ffn_dim) == (63, 7, 1280)
    assert 9 * (layer.num_params() - layer.num_router_params()) == 1_887_436_800
    assert 9 * (layer.num_active_params() - layer.num_router_params()) == 235_929_600


def test_deepseekmoe_16b_has_the_papers_parameters() -> None:
    """Matrices of experts, attention and both embeddings; the first layer is dense."""
    sizes = {"embed_dim": 2048, "num_experts": 66, "top_k": 8, "expert_ffn_dim": 1408, "activation": "swiglu"}
    layer = MHMoEConfig(**sizes, **RAW_LINEAR).sharing(2)
    assert (layer.num_experts, layer.top_k, layer.shared_expert_dim) == (64, 6, 2816)
    rest = 2 * 102_400 * 2048 + 28 * 4 * 2048**2 + 3 * 2048 * 10_944
    assert rest + 27 * (layer.num_params() - layer.num_router_params()) == 16_372_072_448
    assert rest + 27 * (layer.num_active_params() - layer.num_router_params()) == 2_824_994_816


def test_shared_experts_are_experts_of_weight_one() -> None:
    """One wide shared expert computes what so many of the experts would (DeepSeekMoE equation 9)."""
    model = small_model("deepseekmoe_lm_tiny", mhmoe_shared_experts=2, no_subln=True).double().eval()
    layer = next(of.moe_layer for of in model.decoder.layers if of.is_moe_layer)
    torch.manual_seed(0)
    x, f = torch.randn(5, 32, dtype=torch.float64), layer.config.expert_ffn_dim
    shared, expected = layer.shared_expert, 0
    for of in (slice(0, f), slice(f, 2 * f)):  # two experts of width f; the output's bias in one of them
        hidden = torch.nn.functional.gelu(x @ shared.fc1.weight[of].T + shared.fc1.bias[of])
        expected = expected + hidden @ shared.fc2.weight[:, of].T
    torch.testing.assert_close(shared(x), expected + shared.fc2.bias)
    probabilities = (x @ layer.router.weight.T).softmax(1)
    gates = layer.gate(layer.router(x)).gates_NK
    torch.testing.assert_close(gates, probabilities.topk(6).values)  # neither renormalised nor of the shared ones
    assert layer.router.weight.shape == (30, 32)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"mhmoe_heads_number": 4}, r"--mhmoe-shared-experts \(1\) needs --mhmoe-heads-number 1, not 4"),
        ({"mhmoe_shared_expert_dim": 8}, r"--mhmoe-shared-experts \(1\) contradicts --mhmoe-shared-expert-dim: give"),
        ({"mhmoe_shared_experts": 8}, r"--mhmoe-shared-experts \(8\) must be less than the experts of a token \(8\)"),
        ({"mhmoe_granularity": 3}, r"--mhmoe-granularity \(3\) must divide --moe-ffn-dim \(512\)"),
        ({"mhmoe_shared_experts": -1}, r"--mhmoe-shared-experts \(-1\) must be at least 0"),
        ({"mhmoe_routing": "torchscale"}, "torchscale"),
    ],
)
def test_refused(flags: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder_settings(architecture_options("deepseekmoe_lm_tiny", **flags), vocab_size=50)


@pytest.mark.parametrize("kind", KINDS)
def test_remoe_has_the_references_experts(kind: str) -> None:
    ours, reference = config(f"remoe_{kind}_tiny"), config(f"smoe_{kind}_tiny")
    assert ours == dataclasses.replace(reference, routing="relu")
    assert ours.counts() == reference.counts()


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"mhmoe_normalize_gates": "on"}, r"--mhmoe-normalize-gates \(on\) contradicts --mhmoe-routing relu"),
        ({"mhmoe_gate_score": "sigmoid"}, r"--mhmoe-gate-score \('sigmoid'\) contradicts --mhmoe-routing relu"),
        ({"mhmoe_balancing": "bias-sign"}, r"--mhmoe-balancing \('bias-sign'\) contradicts --mhmoe-routing relu"),
        ({"mhmoe_capacity_factor": 2.0}, "--mhmoe-capacity-factor is about capacity; it contradicts relu routing"),
    ],
)
def test_remoe_refuses_what_is_about_a_fixed_number(flags: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder_settings(architecture_options("remoe_lm_tiny", **flags), vocab_size=50)
