"""Experts that choose sub-tokens: by hand, against a loop over sub-tokens, padded, empty, counted."""

import pytest
import torch
from moe_oracle import expert, router_logits

from mhmoe_fairseq.moe import MHMoEConfig, MHMoELayer
from mhmoe_fairseq.moe.expert_choice import ExpertChoiceGate
from mhmoe_fairseq.moe.gate import GateFields

EXPERTS, DIM = 3, 6
LOGITS = torch.tensor([[2.0, 0.0], [1.5, 0.0], [0.0, 1.0], [0.5, 0.2]])


def taken(logits, padding_mask=None, **fields):
    gate = ExpertChoiceGate(GateFields(num_experts=logits.size(1), routing="expert-choice", **fields))
    assignment = gate(logits, padding_mask)
    found = [(assignment.experts_NK == number).any(1).nonzero().flatten().tolist() for number in range(logits.size(1))]
    kept = assignment.kept_NK
    assert torch.equal(assignment.gates_NK[kept], logits.softmax(1).gather(1, assignment.choices_NK)[kept])
    assert not assignment.gates_NK[~kept].any() and (assignment.experts_NK[~kept] == logits.size(1)).all()
    return found


def test_by_hand():
    assert taken(LOGITS, top_k=1) == [[0, 1], [2, 3]]
    changed = torch.cat([LOGITS[:3], torch.tensor([[3.0, 0.0]])])
    assert taken(changed, top_k=1) == [[0, 3], [1, 2]]  # another expert for 1, because of what comes after it


def test_how_many_an_expert_takes():
    assert taken(LOGITS, top_k=2) == [[0, 1, 2, 3]] * 2
    assert taken(LOGITS, top_k=1, capacity_factor=1.6) == [[0, 1, 3], [1, 2, 3]]  # int(1.6 * 4 / 2)
    assert taken(LOGITS, top_k=1, capacity_factor=0.1) == [[0], [2]]  # at least one
    assert taken(LOGITS, top_k=2, capacity_factor=9.0) == [[0, 1, 2, 3]] * 2  # at most all
    assert taken(torch.zeros(5, 2), top_k=1) == [[0, 1]] * 2  # ties: the first


def test_padding_is_not_taken_and_takes_no_place():
    mask = torch.tensor([True, False, False, True])
    assert taken(LOGITS, mask, top_k=1) == [[1], [2]]
    assert taken(LOGITS, mask, top_k=2) == [[1, 2]] * 2
    assert taken(LOGITS, torch.ones(4, dtype=torch.bool), top_k=2) == [[], []]


def layer_of(backend="auto", **changes):
    fields = {"embed_dim": 2 * DIM, "num_heads": 2, "num_experts": EXPERTS, "expert_ffn_dim": 5, "router": "linear"}
    torch.manual_seed(0)
    return MHMoELayer(MHMoEConfig(**{**fields, "routing": "expert-choice", **changes}), backend=backend).double()


@pytest.mark.parametrize("backend", ["loop", "blocked"])
@pytest.mark.parametrize("top_k, factor", [(1, 1.0), (2, 0.8), (3, 1.0)])
def test_outputs_and_all_gradients_are_those_of_a_loop(backend, top_k, factor):
    layer = layer_of(backend, top_k=top_k, capacity_factor=factor, num_projection_layers=0)
    x = torch.randn(2, 4, 2 * DIM, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[1, 2:] = True
    output = layer(x, mask)
    subtokens, is_real = x.reshape(-1, DIM), (~mask).flatten().repeat_interleave(2).tolist()
    probs = torch.stack([router_logits(layer, token, 0).softmax(0) for token in subtokens])
    real = [number for number, kept in enumerate(is_real) if kept]
    slots = int(factor * top_k * len(real) / EXPERTS)
    expected = [torch.zeros(DIM, dtype=x.dtype) for _ in subtokens]
    for index in range(EXPERTS):
        best = sorted(real, key=lambda number: -probs[number, index].item())[:slots]
        for number in best:
            expected[number] = expected[number] + probs[number, index] * expert(layer, index, subtokens[number])
    expected = torch.stack(expected).view(x.shape)
    torch.testing.assert_close(output.hidden, expected, rtol=1e-10, atol=1e-12)
    assert output.stats.expert_load.tolist() == [slots] * EXPERTS and output.stats.dropped == 0
    inputs, factors = [x, *layer.parameters()], torch.randn_like(x)
    for one, other in zip(*(torch.autograd.grad((y * factors).sum(), inputs) for y in (output.hidden, expected))):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_loads_need_no_balance_loss_in_training_and_evaluation():
    for training in (True, False):
        output = layer_of(top_k=2).train(training)(torch.randn(3, 5, 2 * DIM, dtype=torch.float64))
        assert output.balance_loss == 0 and output.stats.expert_load.tolist() == [20.0] * EXPERTS


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_flops_are_what_experts_take(factor):
    layer = layer_of("blocked", top_k=2, capacity_factor=factor, num_experts=4)
    assert layer.counts().params == sum(parameter.numel() for parameter in layer.parameters())
    probs = (
        layer.config.flops_per_token() - layer_of(top_k=2, num_experts=4, routing="dropless").config.flops_per_token()
    )
    of_experts = 2 * 2 * 2 * 2 * DIM * 5  # 2 sub-tokens, top-2, 2 matrices of 6 x 5, 2 FLOPs each
    assert probs == (factor - 1) * of_experts


def test_every_bank_chooses_among_its_heads_sub_tokens():
    layer = layer_of(expert_banks="per-head", top_k=1, num_projection_layers=0)
    x = torch.randn(1, 6, 2 * DIM, dtype=torch.float64)
    assignments = []
    layer.gate.register_forward_hook(lambda module, given, output: assignments.append((given[0], output)))
    assert layer(x).stats.expert_load.tolist() == [2.0] * 2 * EXPERTS
    [(logits, assignment)] = assignments
    for head in range(2):
        probs = logits[head::2].softmax(1)
        for index in range(EXPERTS):
            best = sorted(range(6), key=lambda number: -probs[number, index].item())[:2]
            has = (assignment.experts_NK == head * EXPERTS + index).any(1).nonzero().flatten()
            assert sorted(2 * number + head for number in best) == has.tolist()


def test_compiled_it_is_the_same():
    layer, x = layer_of(), torch.randn(2, 4, 2 * DIM, dtype=torch.float64)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x).hidden, layer(x).hidden, rtol=0, atol=1e-12)
