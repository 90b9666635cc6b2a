"""ReMoE: by hand, against a loop over sub-tokens, its regulariser's weight, and sub-tokens without experts."""

import copy
import sys
from pathlib import Path

import pytest
import torch

from mhmoe_fairseq.moe import MHMoEConfig, MHMoELayer, RoutingStats
from mhmoe_fairseq.moe.gate import GateFields
from mhmoe_fairseq.moe.losses import load_balancing_loss, router_sums
from mhmoe_fairseq.moe.remoe import AdaptiveWeight, ReLUGate
from mhmoe_fairseq.moe.updates import UpdateSums

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

from bench.memory import tensor_peak

EXPERTS, DIM = 4, 6
LOGITS = torch.tensor([[0.5, -1.0, 0.2, -0.1], [-2.0, 0.3, -0.4, 0.0]])


def layer_of(backend="auto", **changes):
    fields = {"embed_dim": 2 * DIM, "num_heads": 2, "num_experts": EXPERTS, "expert_ffn_dim": 5, "router": "linear"}
    torch.manual_seed(0)
    layer = MHMoELayer(MHMoEConfig(**{**fields, "routing": "relu", **changes}), backend=backend).double()
    layer.gate.adaptive.weight.fill_(0.5)  # else the regulariser would hide in rounding
    return layer


def sums_of(load, num_subtokens=8.0):
    zero = torch.zeros((), dtype=torch.float64)
    return UpdateSums(RoutingStats(torch.tensor(load).double(), zero, zero, zero + num_subtokens), None)


def adaptive(top_k=1, weight=1e-8):
    module = AdaptiveWeight(GateFields(num_experts=EXPERTS, top_k=top_k))
    module.weight.fill_(weight)
    return module


def test_by_hand():
    gate = ReLUGate(GateFields(num_experts=4, top_k=1, routing="relu"))
    gate.adaptive.weight.fill_(0.5)
    assignment = gate(LOGITS)
    assert assignment.experts_NK.tolist() == [[0, 2, 4, 4], [1, 4, 4, 4]]
    torch.testing.assert_close(assignment.gates_NK, torch.tensor([[0.5, 0.2, 0, 0], [0.3, 0, 0, 0]]))
    torch.testing.assert_close(assignment.probs_NE.sum(1), torch.ones(2))
    sums = router_sums(LOGITS, assignment, None)
    assert sums.chosen_E.tolist() == [1, 1, 1, 0]
    assert float(load_balancing_loss(sums)) == pytest.approx(0.5)  # .5 4 (.25 .5 + .15 .5 + .1 .5)
    padded = gate(LOGITS, torch.tensor([False, True]))
    assert padded.experts_NK.tolist() == [[0, 2, 4, 4], [4, 4, 4, 4]] and not padded.gates_NK[1].any()
    two = router_sums(LOGITS, ReLUGate(GateFields(num_experts=4, top_k=2, routing="relu"))(LOGITS), None)
    torch.testing.assert_close(two.chosen_E, sums.chosen_E / 2)
    scaled = ReLUGate(GateFields(num_experts=4, top_k=1, routing="relu", gate_scale=2.5))
    torch.testing.assert_close(scaled(LOGITS).gates_NK, 2.5 * assignment.gates_NK)
    assert gate(LOGITS.bfloat16()).gates_NK.dtype == torch.float32


def test_the_weight_follows_the_share_of_experts_in_use():
    module = adaptive()
    module.after_updates([sums_of([1.0, 1, 1, 0], 2.0)])  # sparsity .625 below .75
    assert module.weight.item() == pytest.approx(1.2e-8)
    module.after_updates([sums_of([1.0, 0, 0, 0], 2.0)])
    assert module.weight.item() == pytest.approx(1e-8)
    module.after_updates([sums_of([1.0, 1, 1, 0], 2.0), sums_of([0.0, 0, 0, 0], 2.0)])  # .8125 of both layers
    assert module.weight.item() == pytest.approx(1e-8 / 1.2)
    module.after_updates([sums_of([0.0, 0, 0, 0], 0.0)])  # of nothing, nothing follows
    bounded = adaptive()
    for loads, other in (([0.0, 0, 0, 0], [2.0, 2, 2, 2]), ([2.0, 2, 2, 2], [0.0, 0, 0, 0])):
        for _ in range(1000):
            bounded.after_updates([sums_of(loads, 2.0)])
        there = float(bounded.weight)
        assert 0 < there < torch.inf
        bounded.after_updates([sums_of(other, 2.0)])
        assert float(bounded.weight) == pytest.approx(there * (1.2 if sum(other) else 1 / 1.2))  # and it comes back
    assert module.weight.item() == pytest.approx(1e-8 / 1.2)
    two = adaptive(top_k=2)
    two.after_updates([sums_of([1.0, 1, 1, 0], 2.0)])  # .625 above .5
    assert two.weight.item() == pytest.approx(1e-8 / 1.2)


def test_from_the_first_weight_to_a_hundredth_are_76_steps():
    module, steps = adaptive(), 0
    while module.weight < 0.01:
        module.after_updates([sums_of([8.0, 8, 8, 8])])
        steps += 1
    assert steps == 76


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_weight_is_kept_in_full_and_in_the_state(dtype):
    layer = layer_of().to(dtype)
    assert layer.router.weight.dtype == dtype and layer.gate.adaptive.weight.dtype == torch.float64
    single = MHMoELayer(MHMoEConfig(embed_dim=8, num_experts=4, expert_ffn_dim=8, routing="relu")).to(dtype)
    assert single.state_dict()["gate.adaptive.weight"].dtype == torch.float32
    assert single.gate.adaptive.weight == torch.tensor(1e-8)
    with torch.device("meta"):
        built = MHMoELayer(single.config)
    built.to_empty(device="cpu").reset_parameters()
    assert built.gate.adaptive.weight == torch.tensor(1e-8)


@pytest.mark.parametrize("backend", ["loop", "blocked"])
def test_without_experts_outputs_and_gradients_are_zero(backend):
    layer = layer_of(backend, num_heads=1)
    with torch.no_grad():
        layer.router.weight.fill_(-1)
    x = torch.rand(3, 2 * DIM, dtype=torch.float64).requires_grad_()
    output = layer(x)
    (output.hidden.sum() + output.balance_loss).backward()
    assert not output.hidden.any() and output.balance_loss == 0 and not output.stats.expert_load.any()
    assert not x.grad.any() and not layer.router.weight.grad.any()
    assert not any(torch.isnan(parameter.grad).any() for parameter in layer.parameters() if parameter.grad is not None)
    assert torch.isfinite(output.stats.entropy)


def test_on_a_cpu_experts_that_are_not_used_take_no_memory():
    peaks = []
    for fields in ({"routing": "dropless"}, {"routing": "relu"}):
        layer = MHMoELayer(
            MHMoEConfig(embed_dim=64, num_experts=32, top_k=1, expert_ffn_dim=256, router="linear", **fields)
        )
        x = torch.ones(1024, 64) + 0.1 * torch.randn(1024, 64)
        with torch.no_grad():
            layer.router.weight.fill_(-1)[0].fill_(1)
        parameters = [*layer.parameters(), *layer.buffers(), x]
        peaks.append(tensor_peak(lambda layer=layer, x=x: layer(x).hidden.sum().backward(), parameters))
    assert peaks[1] < 3 * peaks[0]  # of the choices themselves there are N E; with as many rows of experts it is 6


def test_every_head_has_its_bank():
    layer = layer_of(expert_banks="per-head", num_projection_layers=0)
    x = torch.randn(6, 2 * DIM, dtype=torch.float64)
    logits = layer.router(x.view(-1, DIM)).view(6, 2, EXPERTS)
    assert layer(x).stats.expert_load.tolist() == (logits > 0).sum(0).flatten().tolist()


def test_a_token_does_not_depend_on_others_nor_on_the_weight():
    layer, x = layer_of(), torch.randn(5, 2 * DIM, dtype=torch.float64)
    other = copy.deepcopy(layer)
    other.gate.adaptive.weight.fill_(3)
    torch.testing.assert_close(layer(x).hidden[2:3], other(x[2:3]).hidden)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"gate_score": "sigmoid"}, r"gate_score \('sigmoid'\) contradicts routing relu"),
        ({"balancing": "bias-sign"}, r"balancing \('bias-sign'\) contradicts routing relu"),
        ({"second_expert_policy": "random"}, r"second_expert_policy \('random'\) contradicts routing relu"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        layer_of(**fields)
