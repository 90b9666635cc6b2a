"""Scores and the gate weights made of them, against numbers computed by hand from the papers' formulas."""

import pytest
import torch

from mhmoe_fairseq.moe import ConfigError, MHMoEConfig, MHMoELayer
from mhmoe_fairseq.moe.gate import Gate, GateFields
from mhmoe_fairseq.moe.losses import load_balancing_loss, router_sums
from mhmoe_fairseq.moe.router import ROUTERS

FIELDS = {"embed_dim": 8, "num_heads": 2, "num_experts": 4, "expert_ffn_dim": 8}
LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 3.0, 1.0, 0.0]], dtype=torch.float64)


def balance_loss(assignment):
    return load_balancing_loss(router_sums(LOGITS, assignment, None, count="topk"))


def test_deepseekmoe_weighs_by_the_raw_softmax_and_counts_all_choices():
    """Equations 9 to 14 of DeepSeekMoE."""
    assignment = Gate(GateFields(num_experts=4, normalize_gates=False))(LOGITS)
    assert assignment.choices_NK.tolist() == [[0, 1], [1, 2]]
    assert assignment.gates_NK.sum(1).tolist() == pytest.approx([0.880797, 0.919367], abs=1e-6)
    assert assignment.probs_NE.mean(0).tolist() == pytest.approx([0.342115, 0.523329, 0.098368, 0.036187], abs=1e-6)
    assert float(balance_loss(assignment)) == pytest.approx(1.487142, abs=1e-6)


def test_the_balance_loss_of_sigmoids_is_of_their_shares():
    """As P of DeepSeek-V3's loss; both rows taken as one sequence, its value is that loss's."""
    assignment = Gate(GateFields(num_experts=4, gate_score="sigmoid", normalize_gates=False))(LOGITS)
    assert assignment.gates_NK[0].tolist() == pytest.approx([0.880797, 0.731059], abs=1e-6)
    assert assignment.probs_NE.mean(0).tolist() == pytest.approx([0.278137, 0.331011, 0.241214, 0.149639], abs=1e-6)
    assert float(balance_loss(assignment)) == pytest.approx(1.181372, abs=1e-6)


@pytest.mark.parametrize("padding", [None, torch.tensor([False, True])])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_scale_multiplies_whatever_the_gate_weights_are(normalize, padding):
    fields = {"num_experts": 4, "gate_score": "sigmoid", "normalize_gates": normalize}
    plain, scaled = (Gate(GateFields(**fields, gate_scale=scale))(LOGITS, padding).gates_NK for scale in (1.0, 2.5))
    torch.testing.assert_close(scaled, 2.5 * plain)
    assert not normalize or scaled[0].sum().item() == pytest.approx(2.5)


@pytest.mark.parametrize("logit", [-1e4, -60.0, 60.0, 1e4])
def test_scores_that_all_vanish_or_saturate_are_no_nan(logit):
    """Of 1e-26 each half the weight; of 0, none."""
    logits = torch.full((3, 4), logit, requires_grad=True)
    assignment = Gate(GateFields(num_experts=4, gate_score="sigmoid"))(logits)
    (assignment.gates_NK.square().sum() + assignment.probs_NE.square().sum()).backward()
    assert logits.grad.isfinite().all() and assignment.gates_NK.isfinite().all()
    tiny = torch.full((1, 4), -40.0)
    assert Gate(GateFields(num_experts=4, gate_score="sigmoid"))(tiny).gates_NK.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("routing", ["dropless", "capacity"])
@pytest.mark.parametrize("router", [name for name in ROUTERS if name != "domain"])  # which has no scores
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_router_and_routing_has_weights_in_float32(router, routing, dtype):
    torch.manual_seed(0)
    config = MHMoEConfig(**FIELDS, router=router, routing=routing, gate_score="sigmoid", gating_fp32=False)
    layer, seen = MHMoELayer(config).to(dtype), []
    layer.gate.register_forward_hook(lambda gate, given, assignment: seen.append(assignment))
    hidden = layer(torch.randn(6, 8, dtype=dtype)).hidden
    assert hidden.dtype == dtype and hidden.isfinite().all()
    assert seen[0].gates_NK.dtype == seen[0].probs_NE.dtype == torch.float32
    torch.testing.assert_close(seen[0].probs_NE.sum(1), torch.ones(12))


@pytest.mark.parametrize("policy", ["sampling", "random"])
def test_what_draws_by_probabilities_needs_them(policy):
    with pytest.raises(ConfigError, match=rf"second_expert_policy \('{policy}'\) .* needs gate_score softmax, not sig"):
        MHMoEConfig(**FIELDS, gate_score="sigmoid", second_expert_policy=policy)


def test_a_bias_of_logits_chooses_otherwise_than_one_of_probabilities():
    """Multi-Head LatentMoE: topK(s + b), weighed by the softmax of the chosen logits (arXiv 2602.04870)."""
    logits, bias = torch.tensor([[2.0, 1.9, 0.0]], dtype=torch.float64), torch.tensor([[0.0, 0.0, 1.5]])
    for score, chosen in (("logit", [0, 1]), ("softmax", [2, 0])):
        gate = Gate(GateFields(num_experts=3, gate_score=score, balancing="bias-sign"))
        gate.balancing.bias.copy_(bias)
        assignment = gate(logits)
        assert assignment.choices_NK.tolist() == [chosen]
        torch.testing.assert_close(assignment.gates_NK, logits[:, chosen].softmax(1))
        torch.testing.assert_close(assignment.probs_NE, logits.softmax(1))


def test_an_unknown_score_is_refused():
    with pytest.raises(ConfigError, match=r"gate_score \('logit'\) is softmax without a balancing, which is none"):
        MHMoEConfig(**FIELDS, gate_score="logit")
    with pytest.raises(ConfigError, match=r"gate_score \('tanh'\) must be one of softmax, sigmoid, logit"):
        MHMoEConfig(**FIELDS, gate_score="tanh")
