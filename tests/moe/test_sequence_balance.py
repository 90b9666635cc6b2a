"""The balance loss of each sequence by itself (DeepSeek-V3): by hand, and as the mean of the sequences' own."""

import pytest
import torch
from test_layer import build

from mhmoe_fairseq.moe import ConfigError, MHMoEConfig
from mhmoe_fairseq.moe.gate import Gate, GateFields
from mhmoe_fairseq.moe.losses import load_balancing_loss, router_sums

SEQUENCE = {"balance_scope": "sequence"}
VARIANTS = {
    "first choices": {},
    "all choices": {"balance_assignment": "topk", "top_k": 3},
    "gate weights": {"balance_assignment": "gates"},
    "sigmoid": {"gate_score": "sigmoid", "balance_assignment": "topk"},
    "banks": {"expert_banks": "per-head", "balance_assignment": "topk"},
    "one head": {"num_heads": 1},
    "capacity": {"routing": "capacity", "balance_assignment": "topk"},
}


def test_by_hand_choices_are_counted_without_the_bias():
    """V3's report: f = 1, 2, 1, 0 and P = .278137, .331011, .241214, .149639 of two tokens."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 3.0, 1.0, 0.0]], dtype=torch.float64)
    gate = Gate(GateFields(num_experts=4, gate_score="sigmoid", balancing="bias-sign")).double()
    gate.balancing.bias.copy_(torch.tensor([0, -0.5, 0.5, 0]))
    assignment = gate(logits)
    assert assignment.choices_NK.tolist() == [[2, 0], [2, 0]]
    one = router_sums(logits, assignment, None, count="topk", sequences=1)
    assert one.chosen_E.tolist() == [[0.5, 1.0, 0.5, 0.0]]  # of each token together 1
    assert float(load_balancing_loss(one)) == pytest.approx(1.181372, abs=1e-6)
    both = router_sums(logits, assignment, None, count="topk", sequences=2)
    each = [
        load_balancing_loss(router_sums(row[None], gate(row[None]), None, count="topk", sequences=1)) for row in logits
    ]
    assert load_balancing_loss(both) == pytest.approx(float(sum(each)) / 2)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("padded", [False, True])
def test_is_the_mean_of_what_the_sequences_have_alone(variant, padded):
    layer = build(**VARIANTS[variant], **SEQUENCE)
    x = torch.randn(4, 6, 24, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([6, 2, 0, 5] if padded else [6] * 4)
    mask = torch.arange(6) >= lengths.unsqueeze(1)
    parameters = [x, *layer.router.parameters()]
    whole = layer(x, mask)
    alone = [build(**VARIANTS[variant])(row[:length][None]) for row, length in zip(x, lengths) if length]
    expected = torch.stack([out.balance_loss for out in alone]).mean()
    torch.testing.assert_close(whole.balance_loss, expected)
    ours, theirs = (torch.autograd.grad(loss, [x])[0] for loss in (whole.balance_loss, expected))
    torch.testing.assert_close(ours, theirs)
    assert all(of.isfinite().all() for of in torch.autograd.grad(layer(x, mask).balance_loss, parameters))
    torch.testing.assert_close(whole.z_loss, build(**VARIANTS[variant])(x, mask).z_loss)


def test_sequences_that_are_balanced_together_alone_are_not():
    logits = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0], [0.0, 9.0]])
    assignment = Gate(GateFields(num_experts=2, top_k=1))(logits)
    losses = [load_balancing_loss(router_sums(logits, assignment, None, sequences=of)) for of in (None, 1, 2)]
    assert losses == pytest.approx([1.0, 1.0, 2.0], abs=1e-3)


@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24), (0, 3, 24), (3, 24), (2, 2, 3, 24)])
def test_any_number_of_dimensions_and_no_tokens(shape):
    out = build(**SEQUENCE)(torch.randn(shape, dtype=torch.float64))
    assert out.balance_loss.shape == () == out.z_loss.shape and (out.balance_loss > 0) == (out.hidden.numel() > 0)


@pytest.mark.parametrize("routing", ["relu", "expert-choice"])
def test_routings_without_choices_of_a_sub_token_are_refused(routing):
    with pytest.raises(ConfigError, match="balance_scope.*counts a sub-token's K choices"):
        MHMoEConfig(embed_dim=8, num_experts=2, expert_ffn_dim=8, router="linear", routing=routing, **SEQUENCE)
