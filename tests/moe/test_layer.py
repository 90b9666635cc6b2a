"""The layer against the per-token oracle: outputs, losses and every gradient."""

import random

import moe_oracle
import pytest
import torch
from moe_oracle import relative_error

from mhmoe_fairseq.moe import MHMoEConfig, MHMoELayer
from mhmoe_fairseq.moe.gate import GATES

every_routing = pytest.mark.parametrize("routing", GATES)
VARIANTS = {
    "plain": {},
    "one_head": {"num_heads": 1},
    "linear_router": {"router": "linear"},
    "cosine_router": {"router_normalize": "both", "router_temperature": 0.3, "router_dim": 4},
    "swiglu_no_bias": {"activation": "swiglu", "expert_bias": False, "projection_bias": False},
    "swiglu": {"activation": "swiglu"},
    "relu_subln": {"activation": "relu", "expert_layernorm": True},
    "top1": {"top_k": 1},
    "top3": {"top_k": 3},
    "all_experts": {"top_k": 5, "num_experts": 5},
    "one_expert": {"top_k": 1, "num_experts": 1},
    "raw_gates": {"normalize_gates": False},
    "sigmoid": {"gate_score": "sigmoid", "gate_scale": 2.5, "balance_assignment": "topk"},
    "sigmoid_raw": {"gate_score": "sigmoid", "normalize_gates": False, "router": "linear"},
    "sigmoid_top1": {"gate_score": "sigmoid", "top_k": 1, "router_normalize": "both", "router_temperature": 0.3},
    "biased": {"balancing": "bias-sign"},
    "biased_sigmoid": {"balancing": "quantile", "gate_score": "sigmoid", "top_k": 3, "router": "linear"},
    "biased_logit": {"balancing": "bias-sign", "gate_score": "logit", "top_k": 3},
    "raw_scaled": {"normalize_gates": False, "gate_scale": 16.0},
    "topk_balance": {"balance_assignment": "topk"},
    "gates_balance": {"balance_assignment": "gates", "top_k": 3},
    "scaled_gates_balance": {"balance_assignment": "gates", "normalize_gates": False, "gate_scale": 2.5},
    "banks_gates_balance": {"expert_banks": "per-head", "balance_assignment": "gates"},
    "residual": {"subtoken_residual": True},
    "no_projections": {"num_projection_layers": 0},
    "deep_projections": {"num_projection_layers": 3},
    "head_only": {"merge_projection": False},
    "merge_only": {"head_projection": False},
    "one_head_projected": {"num_heads": 1, "head_projection": True, "merge_projection": True},
    "no_split": {"split": False},
    "shared": {"shared_expert_dim": 20},
    "shared_swiglu": {"shared_expert_dim": 20, "activation": "swiglu"},
    "shared_relu": {"shared_expert_dim": 20, "activation": "relu", "expert_bias": False},
    "swiglu7": {"activation": "swiglu7", "shared_expert_dim": 20},
    "swiglu7_norm_no_bias": {"activation": "swiglu7", "expert_layernorm": True, "expert_bias": False},
    "many_experts": {"num_experts": 40},
    "quantized": {"quantize_experts": True},
    "quantized_shared": {"quantize_experts": True, "shared_expert_dim": 20, "expert_layernorm": True},
    "quantized_banks": {"quantize_experts": True, "expert_banks": "per-head", "latent_dim": 32},
    "quantized_swiglu7": {"quantize_experts": True, "activation": "swiglu7"},
    "quantized_swiglu": {"quantize_experts": True, "activation": "swiglu", "expert_bias": False},
    "narrow_latent": {"latent_dim": 16},
    "wide_latent_no_bias": {"latent_dim": 48, "projection_bias": False},
    "deep_latent": {"latent_dim": 16, "num_projection_layers": 3},
    "latent_of_one_head": {"num_heads": 1, "latent_dim": 16},
    "latent_no_split": {"latent_dim": 16, "split": False, "router_input": "token"},
    "latent_moe": {"num_heads": 1, "latent_dim": 16, "router_input": "token", "shared_expert_dim": 20},
    "stable_latent_moe": {"num_heads": 1, "latent_dim": 16, "router_input": "token", "merge_norm": True},
    "merge_norm": {"merge_norm": True, "subtoken_residual": True, "num_projection_layers": 2},
    "banks": {"expert_banks": "per-head"},
    "banks_latent": {"expert_banks": "per-head", "latent_dim": 32, "router": "linear", "projection_bias": False},
    "banks_topk_balance": {"expert_banks": "per-head", "balance_assignment": "topk", "top_k": 3},
    "banks_cosine": {"expert_banks": "per-head", "router_normalize": "both", "router_temperature": 0.3},
    "relu_routing": {"routing": "relu", "router": "linear"},
    "relu_routing_top1": {"routing": "relu", "top_k": 1, "num_heads": 1, "gate_scale": 2.5, "shared_expert_dim": 20},
    "relu_routing_banks": {"routing": "relu", "expert_banks": "per-head", "latent_dim": 32, "expert_layernorm": True},
    "relu_routing_quantized": {"routing": "relu", "quantize_experts": True, "activation": "swiglu"},
    "banks_swiglu": {"expert_banks": "per-head", "activation": "swiglu", "expert_bias": False, "top_k": 1},
}


def build(dtype=torch.float64, seed=0, backend="auto", **changes):
    torch.manual_seed(seed)
    fields = {"embed_dim": 24, "num_heads": 4, "num_experts": 5, "top_k": 2, "expert_ffn_dim": 16, **changes}
    layer = MHMoELayer(MHMoEConfig(**fields), backend=backend).to(dtype).eval()
    for bias in layer.buffers():  # of a selection that was balanced for a while
        bias.normal_(std=0.1)
    return layer


def gradients(layer, x, hidden, balance, z):
    torch.manual_seed(99)
    loss = (hidden * torch.randn_like(hidden)).sum() + 3 * balance + 2 * z
    named = {"x": x, **dict(layer.named_parameters())}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), grads)}


def assert_equals_oracle(layer, x, mask, tolerance):
    x = x.clone().requires_grad_()
    out = layer(x, mask)
    want = moe_oracle.forward(layer, x, mask)
    got_grads = gradients(layer, x, out.hidden, out.balance_loss, out.z_loss)
    want_grads = gradients(layer, x, *want)
    for got, expected in zip(out[:3], want):
        assert relative_error(got, expected) <= tolerance
    for name, expected in want_grads.items():
        # A gradient that is zero in exact arithmetic is rounding noise in both: measure it on the inputs' scale.
        scale = max(float(expected.abs().max()), 1e-3)
        assert float((got_grads[name] - expected).abs().max()) / scale <= tolerance, name


@pytest.mark.parametrize("backend", ["loop", "grouped", "blocked"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_oracle_in_float32(variant, backend):
    # 32 / 4 features: grouped_mm wants rows of a multiple of 16 bytes
    layer = build(torch.float32, backend=backend, embed_dim=32, **VARIANTS[variant])
    torch.manual_seed(7)
    assert_equals_oracle(layer, torch.randn(9, 32), None, 1e-5)


@pytest.mark.parametrize("backend", ["loop", "blocked"])  # grouped_mm has no float64 kernel
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_oracle_in_float64_with_padding(variant, backend):
    layer = build(torch.float64, backend=backend, **VARIANTS[variant])
    torch.manual_seed(8)
    mask = torch.tensor([False, True, False, False, True, True, False])
    assert_equals_oracle(layer, torch.randn(7, 24, dtype=torch.float64), mask, 1e-10)


@pytest.mark.parametrize("seed", range(25))
def test_random_configurations_equal_oracle(seed):
    draw = random.Random(seed)
    heads = draw.choice([1, 2, 3, 4, 6])
    experts = draw.randint(1, 12)
    layer = build(
        seed=seed,
        backend=draw.choice(["loop", "blocked"]),
        num_heads=heads,
        num_experts=experts,
        top_k=draw.randint(1, experts),
        expert_ffn_dim=draw.randint(1, 20),
        activation=draw.choice(["gelu", "relu", "swiglu"]),
        router=draw.choice(["linear", "xmoe"]),
        expert_layernorm=draw.random() < 0.3,
        expert_bias=draw.random() < 0.7,
        quantize_experts=draw.random() < 0.3,
    )
    torch.manual_seed(seed)
    tokens = draw.randint(1, 9)
    mask = torch.rand(tokens) < 0.3 if draw.random() < 0.6 else None
    if mask is not None:
        mask[draw.randrange(tokens)] = False
    assert_equals_oracle(layer, torch.randn(tokens, 24, dtype=torch.float64), mask, 1e-10)


@pytest.mark.parametrize("routing", ["dropless", "relu"])
def test_pieces_of_an_expert_and_of_the_sub_tokens_sum_up(monkeypatch, routing):
    from mhmoe_fairseq.moe.cpu import loop as _expert_loop

    monkeypatch.setattr(_expert_loop, "_PIECE_ROWS", 3)
    monkeypatch.setattr(_expert_loop, "_GATHERED_ROWS", 6)
    layer = build(num_experts=2, expert_layernorm=True, routing=routing)
    assert_equals_oracle(layer, torch.randn(11, 24, dtype=torch.float64), None, 1e-10)


@pytest.mark.parametrize("backend", ["loop", "blocked"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_gradcheck(activation, backend):
    layer = build(embed_dim=4, num_heads=2, num_experts=3, expert_ffn_dim=3, activation=activation, backend=backend)
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *parameters):
        out = torch.func.functional_call(layer, dict(zip(names, parameters)), (x,))
        return out.hidden, out.balance_loss, out.z_loss

    torch.manual_seed(3)
    inputs = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True)]
    inputs += [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(run, inputs)


def test_ties_go_to_the_lowest_expert():
    layer = build(router="linear", num_experts=5, top_k=3)
    torch.nn.init.zeros_(layer.router.weight)
    load = layer(torch.randn(6, 24, dtype=torch.float64)).stats.expert_load
    assert load.tolist() == [24, 24, 24, 0, 0]


@every_routing
def test_padding_neither_routes_nor_counts_nor_spreads_nan(routing):
    layer = build(routing=routing)
    torch.manual_seed(1)
    x = torch.randn(2, 6, 24, dtype=torch.float64)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[1, 2:] = True
    alone = layer(torch.cat([x[0], x[1, :2]]))
    poisoned = x.masked_fill(mask.unsqueeze(-1), float("nan")).requires_grad_()
    out = layer(poisoned, mask)
    real = out.hidden[~mask]
    torch.testing.assert_close(real, alone.hidden, rtol=0, atol=1e-12)
    torch.testing.assert_close(out.balance_loss, alone.balance_loss)
    torch.testing.assert_close(out.z_loss, alone.z_loss)
    for got, want in zip(out.stats, alone.stats):
        torch.testing.assert_close(got, want)
    (real.sum() + out.balance_loss).backward()
    assert poisoned.grad.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())


@every_routing
def test_all_padding_and_no_tokens_are_harmless(routing):
    layer = build(routing=routing)
    out = layer(torch.randn(3, 24, dtype=torch.float64), torch.ones(3, dtype=torch.bool))
    assert out.balance_loss == 0 and out.z_loss == 0 and out.stats.expert_load.sum() == 0
    empty = layer(torch.empty(0, 24, dtype=torch.float64, requires_grad=True))
    empty.hidden.sum().backward()
    assert empty.hidden.shape == (0, 24) and empty.balance_loss == 0
    assert layer.experts.fc1_weight.grad.abs().sum() == 0


@pytest.mark.parametrize("routing", [name for name, gate in GATES.items() if not gate.drops_tokens])
def test_one_token_at_a_time_equals_the_batch(routing):
    layer = build(routing=routing)
    x = torch.randn(5, 24, dtype=torch.float64)
    single = torch.cat([layer(row[None]).hidden for row in x])
    torch.testing.assert_close(layer(x).hidden, single, rtol=0, atol=1e-12)


@every_routing
def test_evaluation_changes_nothing_and_draws_nothing(routing):
    policy = "all" if GATES[routing].chooses_all else "random"
    layer = build(routing=routing, second_expert_policy=policy, activation_dropout=0.3, dropout=0.2)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(5, 24, dtype=torch.float64)
    state = torch.get_rng_state()
    first = layer(x)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.hidden, layer(x).hidden)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


@every_routing
def test_autocast_runs_experts_in_bfloat16_and_router_in_float32(routing):
    layer = build(
        torch.float32, routing=routing, num_projection_layers=0
    )  # both see the same logits, so the same experts
    x = torch.randn(50, 24)
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer(x)
        low.hidden.float().sum().backward()
    assert low.hidden.dtype == torch.bfloat16 and low.balance_loss.dtype == torch.float32
    assert relative_error(low.hidden.float(), exact.hidden) < 0.05
    assert layer.experts.fc1_weight.grad.dtype == torch.float32


def test_wrong_shapes_are_refused():
    layer = build()
    with pytest.raises(ValueError, match="x has 23 features; embed_dim is 24"):
        layer(torch.randn(3, 23, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"padding_mask has shape \(2,\); x has \(3,\)"):
        layer(torch.randn(3, 24, dtype=torch.float64), torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="backend"):
        build(backend="fast")
