"""Heads with a router and a bank of experts each, and layers of another inner width, against plainer layers; counts."""

import pytest
import torch
from test_layer import assert_equals_oracle, build, gradients
from torch import Tensor

from mhmoe_fairseq.moe import ConfigError, MHMoEConfig, MHMoELayer
from mhmoe_fairseq.moe.router import LinearRouter
from mhmoe_fairseq.moe.stats import head_loads

HEADS, EXPERTS = 4, 5
BANKS = {"expert_banks": "per-head"}
CAPACITY = {"routing": "capacity", "capacity_factor": 0.6, "eval_capacity_fraction": 0.2}


def batch(tokens: int = 30, width: int = 24) -> tuple[Tensor, Tensor]:
    torch.manual_seed(4)
    return torch.randn(tokens, width, dtype=torch.float64), torch.arange(tokens) % 7 == 3


def one_head_layers(layer: MHMoELayer) -> list[MHMoELayer]:
    """Each head of a layer without projections as a layer of its own."""
    state, alone = layer.state_dict(), []
    for head in range(HEADS):
        own = build(**{**vars(layer.config), "embed_dim": 6, "num_heads": 1, "expert_banks": "shared"})
        of_router = {f"router.{name}": state[f"router.{head}.{name}"] for name in own.router.state_dict()}
        of_experts = {
            f"experts.{name}": state[f"experts.{name}"].chunk(HEADS)[head] for name in own.experts.state_dict()
        }
        own.load_state_dict({**of_router, **of_experts})
        alone.append(own.train(layer.training))
    return alone


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"top_k": 3, "balance_assignment": "topk"},
        {"router": "balanced"},
        CAPACITY,
        {**CAPACITY, "router": "linear", "top_k": 1},
        {**CAPACITY, "normalize_before_dropping": True},
    ],
    ids=str,
)
def test_without_projections_every_head_is_a_layer_of_its_own(fields: dict, training: bool) -> None:
    layer = build(**BANKS, num_projection_layers=0, **fields).train(training)
    x, mask = batch()
    output = layer(x, mask)
    parts = [own(part, mask) for own, part in zip(one_head_layers(layer), x.chunk(HEADS, dim=1))]
    torch.testing.assert_close(output.hidden, torch.cat([part.hidden for part in parts], dim=1))
    for name in ("balance_loss", "z_loss"):
        torch.testing.assert_close(getattr(output, name), sum(getattr(part, name) for part in parts) / HEADS)
    torch.testing.assert_close(output.stats.expert_load, torch.cat([part.stats.expert_load for part in parts]))
    for name in ("dropped", "entropy", "num_subtokens"):
        torch.testing.assert_close(getattr(output.stats, name), sum(getattr(part.stats, name) for part in parts))
    assert fields.get("routing") != "capacity" or output.stats.dropped > 0


def test_equal_banks_are_one_shared_bank() -> None:
    shared, banks = build(), build(**BANKS)
    state = shared.state_dict()
    copies = {name: value for name, value in state.items() if name.partition(".")[0] not in ("experts", "router")}
    for name, value in state.items():
        if name.startswith("experts."):
            copies[name] = torch.cat([value] * HEADS)
        elif name.startswith("router."):
            copies |= {name.replace("router", f"router.{head}"): value for head in range(HEADS)}
    banks.load_state_dict(copies)
    x, mask = batch()
    inputs = [x.clone().requires_grad_() for _ in (shared, banks)]
    one, other = (layer(x, mask) for layer, x in zip((shared, banks), inputs))
    torch.testing.assert_close(one.hidden, other.hidden)
    torch.testing.assert_close(one.z_loss, other.z_loss)
    loads = other.stats.expert_load.view(HEADS, EXPERTS)
    assert torch.equal(loads.sum(0), one.stats.expert_load) and torch.equal(loads.sum(1), loads.sum(1)[:1].expand(4))
    # The balance losses differ: one counts all heads together, the other each bank.
    want, got = (gradients(layer, x, out.hidden, 0 * out.z_loss, out.z_loss) for layer, x, out in
                 ((shared, inputs[0], one), (banks, inputs[1], other)))  # fmt: skip
    for name, gradient in want.items():
        if name.startswith("experts."):
            of_banks = got[name].view(HEADS, EXPERTS, *gradient.shape[1:]).sum(0)
        elif name.startswith("router."):
            of_banks = sum(got[name.replace("router", f"router.{head}")] for head in range(HEADS))
        else:
            of_banks = got[name]
        torch.testing.assert_close(of_banks, gradient, msg=name)


def test_what_is_chosen_is_counted_through_all_banks() -> None:
    layer = build(**BANKS, **CAPACITY)
    heard = []
    layer.gate.register_forward_hook(lambda gate, given, assignment: heard.append(assignment))
    x, mask = batch()
    stats = layer(x, mask).stats
    heads_N = torch.arange(len(x) * HEADS) % HEADS
    assert torch.equal(heard[0].choices_NK // EXPERTS, heads_N.unsqueeze(1).expand(-1, 2))
    loads = head_loads(heard[0], HEADS, layer.config.total_experts)
    assert torch.equal(loads.sum(0), stats.expert_load.double()) and stats.dropped > 0
    for head in range(HEADS):  # a head's row holds its own bank alone
        own = slice(head * EXPERTS, (head + 1) * EXPERTS)
        assert loads[head, own].sum() == loads[head].sum() == 2 * (~mask).sum()


def test_a_router_that_acts_after_updates_is_not_one_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LinearRouter, "after_update", lambda router, sums: None, raising=False)
    with pytest.raises(ConfigError, match=r"router \('linear'\) learns from loads of one bank"):
        build(**BANKS, router="linear")


def test_a_latent_moes_router_and_shared_expert_see_the_whole_token() -> None:
    layer = build(num_heads=1, latent_dim=8, router_input="token", router="linear", shared_expert_dim=20)
    assert layer.router.weight.shape == (EXPERTS, 24) and layer.experts.fc1_weight.shape == (EXPERTS, 16, 8)
    assert layer.shared_expert.fc1.weight.shape == (20, 24)
    assert_equals_oracle(layer, *batch(9), 1e-10)


# ---------------------------------------------------------------------- counts and budgets


def test_parameters_of_magi_2() -> None:
    """36 MoE layers of 12 heads with 256 experts each, six of them per head (github.com/SandAI-org/MAGI-2-preview)."""
    config = MHMoEConfig(
        embed_dim=3072, num_heads=12, num_experts=256, top_k=6, expert_ffn_dim=1280, activation="swiglu",
        router="linear", expert_bias=False, projection_bias=False, shared_expert_dim=1280, **BANKS,
    )  # fmt: skip
    assert 36 * config.counts().expert_params == 36 * 12 * 256 * 3 * 256 * 1280 == 108_716_359_680
    assert config.total_experts == 3072 and config.num_banks * config.top_k == 72
    projections, routers, shared = 2 * 3072 * 3072, 12 * 256 * 256, 3 * 3072 * 1280
    assert config.num_active_params() == projections + routers + shared + 72 * 3 * 256 * 1280
    assert config.flops_per_token() == 2 * config.num_active_params()


@pytest.mark.parametrize("latent, experts, top_k", [(768, 8, 2), (256, 8, 2), (1024, 32, 8)])
def test_counts_of_a_multi_head_latent_moe(latent: int, experts: int, top_k: int) -> None:
    """Arithmetic of arXiv 2602.04870: 2 D L + L E + m L E F, of which L E + m L K F active."""
    config = MHMoEConfig(
        embed_dim=768, num_heads=4, latent_dim=latent, num_experts=experts, top_k=top_k, expert_ffn_dim=96,
        router="linear", expert_bias=False, projection_bias=False, **BANKS,
    )  # fmt: skip
    always = 2 * 768 * latent + latent * experts
    assert config.num_params() == always + 2 * latent * experts * 96
    assert config.num_active_params() == always + 2 * latent * top_k * 96
    assert config.flops_per_token() == 2 * config.num_active_params()


VARIANTS = {
    "latent": ({"num_heads": 4, "latent_dim": 384}, {}),
    "wide latent": ({"num_heads": 4, "latent_dim": 1536}, {}),
    "latent moe": ({"num_heads": 1, "latent_dim": 192, "router_input": "token"}, {"top_k": 8, "num_experts": 32}),
    "banks": ({"num_heads": 4, **BANKS}, {}),
    "latent banks": ({"num_heads": 4, "latent_dim": 384, **BANKS}, {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("budget", ["params", "flops"])
def test_variants_spend_what_their_reference_spends(variant: str, budget: str) -> None:
    changes, finer = VARIANTS[variant]
    reference = MHMoEConfig(
        embed_dim=768, num_experts=8, top_k=2, expert_ffn_dim=3072, router="linear", shared_expert_dim=3072
    )
    matched = MHMoEConfig.matching(reference, budget=budget, **changes, **finer)
    gap = matched.budget_gap(reference)
    built = sum(parameter.numel() for parameter in _on_meta(matched).parameters())
    assert built == matched.num_params() and gap.params == built / reference.num_params() - 1
    if budget == "params":
        assert -0.005 <= gap.params <= 0
        assert (matched.num_experts, matched.top_k) == (finer.get("num_experts", 8), finer.get("top_k", 2))
    else:  # an expert of every bank more or less, and the routers, which neither paper's rule counts
        rounding = 0.5 * matched.num_banks * matched.num_expert_params() / reference.num_params()
        assert abs(gap.params) < rounding + 0.005 and abs(gap.flops) < 0.01


def _on_meta(config: MHMoEConfig) -> MHMoELayer:
    with torch.device("meta"):
        return MHMoELayer(config)


def test_finer_banks_are_as_large() -> None:
    config = MHMoEConfig(
        embed_dim=24, num_heads=4, num_experts=6, expert_ffn_dim=48, router="linear", expert_bias=False, **BANKS
    )
    finer = config.finer(3)
    assert (finer.num_experts, finer.top_k, finer.expert_ffn_dim, finer.num_banks) == (18, 6, 16, 4)
    assert finer.counts().expert_params == config.counts().expert_params
    assert finer.num_params() - config.num_params() == 4 * 6 * 12  # the routers' rows of 12 more experts
