"""Capacity routing against TorchScale's own gates, and the padding we treat differently on purpose."""

import contextlib
import dataclasses
from unittest import mock

import moe_oracle
import pytest
import torch

from mhmoe_fairseq.moe import MHMoEConfig, MHMoELayer
from mhmoe_fairseq.moe.gate import CapacityGate, expert_capacity, slot_positions
from mhmoe_fairseq.moe.losses import load_balancing_loss, router_sums

routing = pytest.importorskip("torchscale.component.xmoe.routing", reason="TorchScale is the oracle here")

from mhmoe_fairseq.torchscale_ext.static_xmoe import recorded_histc  # noqa: E402


def config(**changes):
    fields = {"embed_dim": 16, "num_experts": 6, "expert_ffn_dim": 8, "routing": "capacity", **changes}
    return MHMoEConfig(**fields)


def balance_loss(logits, assignment, mask=None):
    return load_balancing_loss(router_sums(logits, assignment, mask))


def torchscale_gate(cfg, logits, *, training, mask=None, noise=None):
    """(l_aux, combine weights (N, E, C)) of TorchScale's gate for our configuration."""
    common = {"eval_mode": not training, "moe_eval_capacity_token_fraction": cfg.eval_capacity_fraction}
    with recorded_histc():
        if cfg.top_k == 1:
            out = routing.top1gating(logits, mask, capacity_factor=cfg.capacity_factor, **common)
        else:
            if noise is not None and cfg.second_expert_policy == "sampling":
                patch = mock.patch.object(routing, "gumbel_rsample", lambda shape, device: noise)
            elif noise is not None:
                patch = mock.patch.object(torch, "rand_like", lambda x: noise)
            else:
                patch = contextlib.nullcontext()
            with patch:
                out = routing.top2gating(
                    logits, mask, second_expert_policy=cfg.second_expert_policy if training else "all",
                    normalize_gate_prob_before_dropping=cfg.normalize_before_dropping, **common,
                )  # fmt: skip
    return out[0], out[1]


def our_combine_weights(cfg, assignment, capacity):
    """Our assignment as TorchScale's (N, E, C) combine weights, slots included."""
    n = assignment.experts_NK.size(0)
    weights = torch.zeros(n, cfg.num_experts + 1, capacity)
    chosen = assignment.kept_NK | assignment.dropped_NK
    slots = slot_positions(assignment.choices_NK.masked_fill(~chosen, cfg.num_experts), cfg.num_experts)
    for i in range(n):
        for j in range(cfg.top_k):
            if assignment.kept_NK[i, j]:
                weights[i, assignment.experts_NK[i, j], slots[i, j]] += assignment.gates_NK[i, j]
    return weights[:, :-1]


CASES = [
    {"top_k": 1},
    {"top_k": 1, "capacity_factor": 0.5},
    {"top_k": 1, "capacity_factor": 1.5},
    {"top_k": 2},
    {"top_k": 2, "normalize_before_dropping": True},
    {"top_k": 2, "eval_capacity_fraction": 0.1},
    {"top_k": 2, "eval_capacity_fraction": -1.0},
    {"top_k": 2, "num_experts": 2},
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("changes", CASES)
@pytest.mark.parametrize("tokens, skew", [(37, 0.0), (64, 2.0), (1, 0.0), (5, 1.0)])
def test_choices_slots_drops_and_losses_equal_torchscale(changes, training, tokens, skew):
    cfg = config(**changes)
    torch.manual_seed(tokens)
    if training and int(cfg.capacity_factor * -(-tokens // cfg.num_experts)) == 0:
        tokens = 20  # TorchScale fails where its capacity rounds to 0; ours is at least 1
    logits = torch.randn(tokens, cfg.num_experts) + skew * torch.arange(cfg.num_experts)
    logits[::4] = logits[::4].round()  # ties
    assignment = CapacityGate(cfg).train(training)(logits)
    l_aux, combine = torchscale_gate(cfg, logits, training=training)
    assert int(expert_capacity(cfg, torch.tensor(tokens), training=training)) == combine.size(2)
    ours = our_combine_weights(cfg, assignment, combine.size(2))
    assert torch.equal(ours > 0, combine > 0)
    torch.testing.assert_close(ours, combine, rtol=0, atol=1e-6)
    balance = balance_loss(logits, assignment)
    torch.testing.assert_close(balance, l_aux, rtol=0, atol=1e-6)


@pytest.mark.parametrize("normalize_before", [True, False])
@pytest.mark.parametrize("policy", ["sampling", "random"])
def test_second_expert_policies_equal_torchscale_under_the_same_noise(policy, normalize_before):
    cfg = config(second_expert_policy=policy, normalize_before_dropping=normalize_before)
    torch.manual_seed(2)
    logits = torch.randn(50, 6)
    noise = torch.randn(50, 6) if policy == "sampling" else torch.rand(50)
    assignment = CapacityGate(cfg)(logits, noise=noise)
    _, combine = torchscale_gate(cfg, logits, training=True, noise=noise)
    torch.testing.assert_close(our_combine_weights(cfg, assignment, combine.size(2)), combine, rtol=0, atol=1e-6)
    quiet = CapacityGate(cfg).eval()(logits)
    without = dataclasses.replace(cfg, second_expert_policy="all")
    plain = CapacityGate(without).eval()(logits)
    assert torch.equal(quiet.gates_NK, plain.gates_NK)


@pytest.mark.parametrize("router", ["linear", "xmoe"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_layer_equals_torchscales_dispatch_with_gradients(top_k, router):
    """One head: outputs within 1e-5, gradients within 1e-4 of TorchScale's one-hot dispatch on our weights."""
    # TorchScale's top-2 gate has no capacity factor
    cfg = config(top_k=top_k, router=router, num_experts=4, capacity_factor=0.75 if top_k == 1 else 1.0)
    torch.manual_seed(4)
    layer = MHMoELayer(cfg)
    x = torch.randn(40, 16, requires_grad=True)
    out = layer(x)
    leaves = [x, *layer.parameters()]
    grads = torch.autograd.grad((out.hidden**2).sum() + out.balance_loss, leaves)

    logits = layer.router(x)
    if router == "xmoe":  # TorchScale's own formula on our parameters
        gate = routing.Top2Gate(16, 4, use_xmoe=True)
        cosine = gate._cosine(x @ layer.router.reduction.weight.t(), layer.router.expert_embedding)
        torch.testing.assert_close(cosine, logits, rtol=0, atol=1e-6)
    l_aux, combine = torchscale_gate(cfg, logits, training=True)
    slots = torch.einsum("sec,sm->ecm", (combine > 0).float(), x)
    outputs = torch.stack([torch.stack([moe_oracle.expert(layer, e, row) for row in slots[e]]) for e in range(4)])
    want = torch.einsum("sec,ecm->sm", combine, outputs)
    want_grads = torch.autograd.grad((want**2).sum() + l_aux, leaves)
    assert moe_oracle.relative_error(out.hidden, want) <= 1e-5
    assert abs(float(out.balance_loss - l_aux)) <= 1e-6
    for got, expected in zip(grads, want_grads):
        assert moe_oracle.relative_error(got, expected) <= 1e-4
    assert out.stats.dropped > 0


def test_padding_costs_no_capacity_and_no_loss_unlike_torchscale():
    cfg = config(top_k=1, num_experts=2, capacity_factor=1.0)
    torch.manual_seed(0)
    logits = torch.tensor([[3.0, 0.0]] * 4 + [[0.0, 3.0]] * 4)
    mask = torch.tensor([False] * 2 + [True] * 4 + [False] * 2)
    ours = CapacityGate(cfg)(logits, mask)
    assert ours.kept_NK[:, 0].tolist() == [True] * 2 + [False] * 4 + [True] * 2
    alone = CapacityGate(cfg)(logits[~mask])
    torch.testing.assert_close(ours.gates_NK[~mask], alone.gates_NK)
    balance = balance_loss(logits, ours, mask)
    torch.testing.assert_close(balance, torch.tensor(1.0), rtol=0, atol=1e-6)
    # TorchScale divides first choices by all 8 rows although 4 are padding: half the loss.
    l_aux, _ = torchscale_gate(cfg, logits, training=True, mask=mask)
    torch.testing.assert_close(l_aux, torch.tensor(0.5), rtol=0, atol=1e-6)


def test_overflow_is_counted():
    layer = MHMoELayer(config(router="linear", num_experts=4, top_k=1))
    torch.nn.init.zeros_(layer.router.weight)  # all ties: everything goes to expert 0
    stats = layer(torch.randn(12, 16)).stats
    assert stats.expert_load.tolist() == [12, 0, 0, 0] and stats.dropped == 9


def test_factor_and_fraction_decide_the_slots():
    tokens = torch.tensor(100)
    cfg = config(num_experts=8, top_k=2, capacity_factor=1.25, eval_capacity_fraction=0.3)
    assert int(expert_capacity(cfg, tokens, training=True)) == 32  # int(1.25 * 2 * ceil(100 / 8))
    assert int(expert_capacity(cfg, tokens, training=False)) == 30
    whole = dataclasses.replace(cfg, eval_capacity_fraction=-1.0)
    assert int(expert_capacity(whole, tokens, training=False)) == 32
