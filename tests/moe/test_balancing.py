"""Balancing without a loss: numbers by hand, the exact quantile, and what a bias may not touch."""

import copy

import pytest
import torch

from mhmoe_fairseq.moe import ConfigError, MHMoEConfig, MHMoELayer, RoutingStats
from mhmoe_fairseq.moe.balancing import BALANCINGS, BalancingFields
from mhmoe_fairseq.moe.gate import Gate, GateFields
from mhmoe_fairseq.moe.updates import UpdateSums

RULES = [name for name in BALANCINGS if name != "none"]
FIELDS = {"embed_dim": 8, "num_heads": 2, "num_experts": 4, "expert_ffn_dim": 8, "router": "linear"}
V3_LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 3.0, 1.0, 0.0]], dtype=torch.float64)
V3_BIAS = torch.tensor([[0.0, -0.5, 0.5, 0.0]])


def build(balancing, **changes):
    torch.manual_seed(0)
    return MHMoELayer(MHMoEConfig(**{**FIELDS, "balancing": balancing, **changes})).double()


def sums_of(*loads, evidence=None):
    return UpdateSums(RoutingStats(torch.tensor(loads, dtype=torch.float64), *torch.zeros(3)), evidence)


def moved(rule, *loads, rate=None):
    """The bias after one update with these loads."""
    balancing = BALANCINGS[rule](BalancingFields(num_experts=len(loads), balancing=rule, balancing_rate=rate)).double()
    balancing.after_update(sums_of(*loads))
    return balancing.bias.squeeze(0).tolist()


# ---------------------------------------------------------------------- the rules


@pytest.mark.parametrize(
    "rule, loads, steps",
    [
        ("bias-sign", (3, 1, 0, 4), (-1, 1, 1, -1)),
        ("bias-proportional", (3, 1, 0, 4), (-0.5, 0.5, 1, -1)),
        ("bias-sign", (5, 1, 1, 1), (-1.5, 0.5, 0.5, 0.5)),
        ("bias-proportional", (5000, 1000, 1000, 1000), (-1.5, 0.5, 0.5, 0.5)),
        ("bias-sign", (2, 2, 2, 2), (0, 0, 0, 0)),
        ("bias-proportional", (2, 2, 2, 2), (0, 0, 0, 0)),
        ("bias-sign", (0, 0, 0, 0), (0, 0, 0, 0)),  # of fillers alone
        ("bias-proportional", (0, 0, 0, 0), (0, 0, 0, 0)),
    ],
)
def test_steps_are_those_by_hand(rule, loads, steps):
    assert moved(rule, *loads) == pytest.approx([0.001 * step for step in steps], abs=1e-12)
    assert moved(rule, *loads, rate=0.5) == pytest.approx([0.5 * step for step in steps], abs=1e-12)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_quantiles_are_those_of_all_sub_tokens_sorted(score, top_k):
    """Counted in two batches, one with padding, against the rule on one batch with all margins at once."""
    torch.manual_seed(top_k)
    logits, experts = torch.randn(700, 8, dtype=torch.float64) + torch.randn(8), 8
    padding = torch.rand(700) < 0.2
    padding[:300] = False
    fields = {"num_experts": experts, "top_k": top_k, "gate_score": score, "balancing": "quantile"}
    gate = Gate(GateFields(**fields)).double()
    gate.balancing.bias.normal_(std=0.1)
    before = gate.balancing.bias.clone()
    counts = gate(logits[:300]).evidence + gate(logits[300:], padding[300:]).evidence
    gate.balancing.after_update(sums_of(*[1.0] * experts, evidence=counts))

    real = logits[~padding]
    biased = (real.softmax(1) if score == "softmax" else real.sigmoid()) + before
    margins = biased - biased.sort(1, descending=True).values[:, top_k : top_k + 1]
    share = int(top_k * len(real) / experts)
    exact = before - margins.sort(0, descending=True).values[share]
    got, want = gate.balancing.bias - before, exact - exact.mean() - before + before.mean()
    assert (got - want).abs().max() <= 0.03 * margins.sort(0, descending=True).values[share].abs().max() * 1.5
    assert want.abs().max() > 0.05

    def excess(bias):
        choices = (biased - before + bias).topk(top_k, dim=1).indices.flatten()
        loads = torch.bincount(choices, minlength=experts).double()
        return float(loads.max() / loads.mean() - 1)

    assert excess(gate.balancing.bias) < 0.35 * excess(before)
    assert excess(gate.balancing.bias) == pytest.approx(excess(exact), abs=0.1)


def test_the_margin_is_that_of_the_first_sub_token_beyond_the_share():
    """Of two each expert should get one: margins .8 and .2 of expert 0, twice 0 of expert 1; the second counts."""
    gate = Gate(GateFields(num_experts=2, top_k=1, gate_score="sigmoid", balancing="quantile")).double()
    evidence = gate(torch.tensor([[0.9, 0.1], [0.6, 0.4]], dtype=torch.float64).logit()).evidence
    gate.balancing.after_update(sums_of(2, 0, evidence=evidence))
    torch.testing.assert_close(gate.balancing.bias[0], torch.tensor([-0.1, 0.1]).double(), rtol=0.03, atol=0)


def test_counts_beyond_float32_add_up_exactly():
    sums = sums_of(0, 0, evidence=torch.tensor([2**24, 1])).over(lambda vector: vector.sum() + 0 * vector)
    assert sums.evidence.tolist() == [2**24 + 1] * 2


def test_a_quantile_of_nothing_moves_nothing():
    gate = Gate(GateFields(num_experts=4, balancing="quantile"))
    evidence = gate(torch.randn(6, 4), torch.ones(6, dtype=torch.bool)).evidence
    gate.balancing.after_update(sums_of(0, 0, 0, 0, evidence=evidence))
    assert not evidence.any() and not gate.balancing.bias.any()


@pytest.mark.parametrize("rule", RULES)
def test_a_favoured_expert_loses_its_advantage(rule):
    """A gap of 0.05 between scores: with steps of 0.001 on both sides after some 25 updates, by quantiles after one."""
    torch.manual_seed(0)
    gate = Gate(GateFields(num_experts=2, top_k=1, gate_score="sigmoid", balancing=rule))
    logits = torch.logit(torch.tensor([0.55, 0.5]) + 0.004 * torch.randn(512, 2))
    excess = []
    for _ in range(60):
        assignment = gate(logits)
        loads = torch.bincount(assignment.choices_NK.flatten(), minlength=2)
        excess.append(float(2 * loads.max() / loads.sum() - 1))
        gate.balancing.after_update(sums_of(*loads.tolist(), evidence=assignment.evidence))
    balanced = next(index for index, value in enumerate(excess) if value < 0.5)
    assert excess[0] == 1 and max(excess[balanced + 5 :]) <= 0.25
    assert (balanced == 1) if rule == "quantile" else (22 <= balanced <= 50)  # noise of 0.006 between the two


# ---------------------------------------------------------------------- what a bias does in the layer


@pytest.mark.parametrize("rule", RULES)
def test_it_chooses_and_does_not_weigh(rule):
    """DeepSeek-V3's equations 12 to 16."""
    gate = Gate(GateFields(num_experts=4, gate_score="sigmoid", gate_scale=2.5, balancing=rule)).double()
    gate.balancing.bias.copy_(V3_BIAS)
    assignment = gate(V3_LOGITS)
    assert assignment.choices_NK.tolist() == [[2, 0], [2, 0]]
    assert assignment.gates_NK[0].tolist() == pytest.approx([0.905274, 1.594726], abs=1e-6)
    assert assignment.gates_NK[1].tolist() == pytest.approx([1.484614, 1.015386], abs=1e-6)


def test_a_dropped_expert_with_a_negative_score_does_not_come_back():
    """What was chosen is taken out by -inf; by zeros, a chosen expert would win again over negative scores."""
    gate = Gate(GateFields(num_experts=3, top_k=2, balancing="bias-sign"))
    gate.balancing.bias.copy_(torch.tensor([[-1.0, -1.5, -2.0]]))
    assert gate(torch.zeros(1, 3)).choices_NK.tolist() == [[0, 1]]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_same_choice_gives_the_same_output_and_gradients(score):
    plain, biased = build("none", gate_score=score), build("bias-sign", gate_score=score)
    x = torch.randn(6, 8, dtype=torch.float64)
    before = plain(x)
    biased.gate.balancing.bias.copy_(torch.tensor([[1e-9, -1e-9, 0.0, 0.0]]))
    after = biased(x)
    assert torch.equal(before.hidden, after.hidden) and before.balance_loss == after.balance_loss
    for output in (before, after):
        (output.hidden.square().sum() + output.balance_loss).backward()
    for one, other in zip(plain.parameters(), biased.parameters()):
        assert torch.equal(one.grad, other.grad)
    assert not biased.gate.balancing.bias.requires_grad
    biased.gate.balancing.bias.copy_(torch.tensor([[9.0, 9.0, 0.0, 0.0]]))
    assert biased(x).stats.expert_load.tolist() == [12, 12, 0, 0]


@pytest.mark.parametrize("rule", RULES)
def test_forward_never_moves_it_and_evaluation_counts_nothing(rule):
    layer = build(rule)
    x = torch.randn(6, 8, dtype=torch.float64)
    assert (layer(x).evidence is not None) == (rule == "quantile")
    assert layer.eval()(x).evidence is None
    assert not layer.gate.balancing.bias.any()


@pytest.mark.parametrize("rule", RULES)
def test_it_is_saved_beside_the_weights_and_nothing_is_without(rule):
    layer = build(rule)
    layer.gate.balancing.bias.normal_()
    assert set(layer.state_dict()) - set(build("none").state_dict()) == {"gate.balancing.bias"}
    loaded = build(rule)
    loaded.load_state_dict(layer.state_dict())
    assert torch.equal(loaded.gate.balancing.bias, layer.gate.balancing.bias)
    assert layer.counts() == build("none").counts()


@pytest.mark.parametrize("cast", [torch.nn.Module.half, torch.nn.Module.bfloat16], ids=lambda cast: cast.__name__)
def test_half_precision_leaves_it_exact(cast):
    """0.5 and a step of 0.001 are 0.5 again in bfloat16."""
    layer = cast(MHMoELayer(MHMoEConfig(**FIELDS, balancing="bias-sign")))
    balancing = layer.gate.balancing
    balancing.bias.fill_(0.5)
    balancing.after_update(sums_of(3.0, 1.0, 0.0, 4.0))
    assert balancing.bias.dtype == torch.float32
    torch.testing.assert_close(balancing.bias, torch.tensor([[0.499, 0.501, 0.501, 0.499]]))
    assert layer(torch.randn(3, 8).to(layer.router.weight.dtype)).hidden.isfinite().all()
    assert copy.deepcopy(layer).float().gate.balancing.bias.dtype == torch.float32


def test_memory_given_to_a_meta_layer_is_reset():
    with torch.device("meta"):
        layer = MHMoELayer(MHMoEConfig(**FIELDS, balancing="quantile"))
    layer.to_empty(device="cpu")
    layer.gate.balancing.bias.fill_(7.0)
    layer.reset_parameters()
    assert not layer.gate.balancing.bias.any()


@pytest.mark.parametrize("rule", RULES)
def test_every_bank_has_a_bias_of_its_own(rule):
    """Of two heads' banks, with the moves that one bank has by its own head's sub-tokens."""
    banks, x = build(rule, expert_banks="per-head"), torch.randn(50, 8, dtype=torch.float64)
    heard = []
    banks.router.register_forward_hook(lambda router, given, logits: heard.append(logits))
    output = banks(x)
    banks.gate.balancing.after_update(UpdateSums(output.stats, output.evidence))
    for head in (0, 1):
        gate = Gate(GateFields(num_experts=4, balancing=rule)).double()
        alone = gate(heard[0][head::2])
        gate.balancing.after_update(sums_of(*torch.bincount(alone.choices_NK.flatten()), evidence=alone.evidence))
        torch.testing.assert_close(banks.gate.balancing.bias[head], gate.balancing.bias[0])
    banks.gate.balancing.bias.copy_(torch.tensor([[9.0, 9, 0, 0], [0, 9.0, 0, 9]]))
    assert banks(x).stats.expert_load.tolist() == [50, 50, 0, 0, 0, 50, 0, 50]


@pytest.mark.parametrize("routing", ["dropless", "capacity"])
@pytest.mark.parametrize("rule", RULES)
def test_a_layer_becomes_balanced_under_either_routing(rule, routing):
    """Loads count before capacity takes any away."""
    torch.manual_seed(1)
    rates = {"bias-sign": 0.005, "bias-proportional": 0.03, "quantile": None}
    layer, x = build(rule, routing=routing, balancing_rate=rates[rule]), torch.randn(200, 8, dtype=torch.float64) + 1
    excess = []
    for _ in range(60):
        output = layer(x)
        load = output.stats.expert_load
        excess.append(float(load.max() / load.mean() - 1))
        layer.gate.balancing.after_update(UpdateSums(output.stats, output.evidence))
    assert excess[0] > 0.3 and excess[-1] < 0.1


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"balancing": "loss"}, r"balancing \('loss'\) must be one of none, bias-sign, bias-proportional, quantile"),
        ({"balancing_rate": 0.1}, r"balancing_rate \(0.1\) needs a balancing, which is none"),
        ({"balancing": "quantile", "top_k": 4}, r"balancing \('quantile'\) has nothing to balance: top_k is num_exper"),
        (
            {"balancing": "bias-sign", "router": "balanced"},
            r"balancing \('bias-sign'\) needs a router whose choices",
        ),
        ({"balancing": "quantile", "routing": "expert-choice"}, "nothing to balance: routing expert-choice gives"),
        ({"balancing": "quantile", "router": "domain", "num_heads": 1, "top_k": 1}, r"router is 'domain'"),
        (
            {"balancing": "bias-sign", "second_expert_policy": "sampling"},
            r"second_expert_policy \('sampling'\) draws by logits, .* balancing is bias-sign",
        ),
    ],
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        MHMoEConfig(**{**FIELDS, **fields})
