"""Group-limited routing against a loop over rows, and against scores chosen by hand."""

import pytest
import torch

from mhmoe_fairseq.moe import ConfigError, MHMoEConfig, MHMoELayer
from mhmoe_fairseq.moe.gate import Gate, GateFields

GROUPS = {"num_experts": 8, "expert_groups": 4, "kept_groups": 2, "top_k": 3}


def choices_of_row(scores: list[float], fields: dict) -> list[int]:
    """The definition, one sub-token at a time."""
    size, best = fields["num_experts"] // fields["expert_groups"], {"max": 1, "top2": 2}[fields["group_score"]]
    of_group = [sum(sorted(scores[start : start + size])[-best:]) for start in range(0, len(scores), size)]
    kept = sorted(range(len(of_group)), key=lambda group: -of_group[group])[: fields["kept_groups"]]
    allowed = [expert for expert in range(len(scores)) if expert // size in kept]
    return sorted(allowed, key=lambda expert: -scores[expert])[: fields["top_k"]]


@pytest.mark.parametrize("gate_score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("group_score", ["max", "top2"])
def test_choices_and_weights_are_those_of_a_loop_over_rows(group_score, gate_score):
    logits = torch.randn(200, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fields = {**GROUPS, "group_score": group_score}
    gate = Gate(GateFields(**fields, gate_score=gate_score))
    scores, found = gate.score.of(logits), gate(logits)
    assert found.choices_NK.tolist() == [choices_of_row(row, fields) for row in scores.tolist()]
    chosen = scores.gather(1, found.choices_NK)
    torch.testing.assert_close(found.gates_NK, chosen / chosen.sum(1, keepdim=True))
    torch.testing.assert_close(found.probs_NE, Gate(GateFields(num_experts=8, gate_score=gate_score))(logits).probs_NE)


def test_the_two_scores_of_a_group_differ():
    logits = torch.tensor([[3.0, -9.0, 2.5, 2.4]])
    fields = {"num_experts": 4, "top_k": 1, "expert_groups": 2}
    assert Gate(GateFields(**fields))(logits).choices_NK.tolist() == [[0]]
    sigmoids = {**fields, "gate_score": "sigmoid", "group_score": "top2"}
    assert Gate(GateFields(**sigmoids))(logits).choices_NK.tolist() == [[2]]


def test_an_expert_of_a_dropped_group_is_not_chosen_for_a_score_above_0():
    """With its bias every expert that may be chosen but one scores below 0, which transformers gives the others."""
    biased = torch.tensor([-0.153, -0.124, -0.182, -0.193, 0.069, -0.018, -0.081, -0.124])
    gate = Gate(GateFields(num_experts=8, top_k=3, expert_groups=2, gate_score="sigmoid", balancing="bias-sign"))
    gate.balancing.bias.copy_(biased - 0.5)
    assert gate(torch.zeros(1, 8)).choices_NK.tolist() == [[4, 5, 6]]


def test_groups_are_of_each_heads_bank_and_learn_like_any_choice():
    fields = {"embed_dim": 16, "num_heads": 2, "expert_ffn_dim": 8, **GROUPS, "expert_banks": "per-head"}
    layer = MHMoELayer(MHMoEConfig(**fields)).double()
    chosen = []
    layer.gate.register_forward_hook(lambda gate, inputs, output: chosen.append(output.experts_NK))
    layer(torch.randn(9, 16, dtype=torch.float64)).hidden.square().sum().backward()
    (experts_NK,) = chosen
    assert (experts_NK // 8 == (torch.arange(18) % 2).unsqueeze(1)).all()
    assert all(len({expert // 2 for expert in row}) <= 2 for row in experts_NK.tolist())
    assert all(parameter.grad is not None for parameter in layer.router.parameters())


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"expert_groups": 3}, r"expert_groups \(3\) must divide num_experts \(8\)"),
        ({"expert_groups": 2, "kept_groups": 3}, r"kept_groups \(3\) must be at most expert_groups \(2\)"),
        ({"expert_groups": 4, "top_k": 3}, r"top_k \(3\) must be at most the 2 experts of kept_groups \(1\)"),
        (
            {"expert_groups": 8, "top_k": 1, "group_score": "top2"},
            r"group_score \('top2'\) needs groups of two experts",
        ),
        ({"group_score": "top2"}, r"group_score \('top2'\) needs groups of two experts or more; expert_groups \(1\)"),
        ({"expert_groups": 2, "balancing": "quantile"}, r"balancing \('quantile'\) ranks margins over all experts"),
        ({"expert_groups": 2, "routing": "expert-choice"}, r"expert_groups \(2\) limits which experts"),
        ({"expert_groups": 2, "routing": "relu"}, r"expert_groups \(2\) limits which experts"),
        ({"expert_groups": 2, "router": "balanced"}, r"expert_groups \(2\) needs a router whose choices are learnt"),
    ],
)
def test_what_does_not_go_together_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        MHMoEConfig(**{"embed_dim": 8, "num_experts": 8, "expert_ffn_dim": 8, **fields})
