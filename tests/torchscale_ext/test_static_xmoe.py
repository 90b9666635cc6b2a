"""TorchScale's own static X-MoE behind our interface."""

import pytest
import torch
import torch.nn.functional as F
from language_models import small_model, token_rows
from moe_oracle import losses_of

from mhmoe_fairseq.moe import MHMoEConfig
from mhmoe_fairseq.torchscale_ext.settings import DecoderSettings
from mhmoe_fairseq.torchscale_ext.static_xmoe import StaticXMoE, recorded_histc


def static_layer(seed=0, **fields):
    torch.manual_seed(seed)
    moe = MHMoEConfig(**{"embed_dim": 16, "num_experts": 4, "expert_ffn_dim": 32, "routing": "capacity", **fields})
    return StaticXMoE(DecoderSettings(moe=moe, feed_forward="torchscale"))


def test_two_experts_with_room_for_all_against_a_loop():
    layer = static_layer(router="linear", eval_capacity_fraction=1.0, gating_fp32=True).eval()
    x = torch.randn(2, 5, 16)
    output = layer(x)
    probs = torch.softmax(layer.layer.gate.wg(x.view(-1, 16)), -1)
    for token, prob, actual in zip(x.view(-1, 16), probs, output.hidden.view(-1, 16)):
        weights, experts = prob.topk(2)
        expected = sum(w / weights.sum() * layer.layer.experts[e](token) for w, e in zip(weights, experts.tolist()))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    first = F.one_hot(probs.argmax(-1), 4).float().mean(0)
    assert output.balance_loss.item() == pytest.approx((4 * (first * probs.mean(0)).sum()).item(), rel=1e-5)
    assert output.z_loss == 0


@pytest.mark.parametrize("top_k", [1, 2])
def test_statistics(top_k):
    layer = static_layer(top_k=top_k, eval_capacity_fraction=0.1).eval()
    stats = layer(torch.randn(4, 10, 16)).stats
    assert stats.expert_load.sum() == 40 * top_k
    assert stats.num_subtokens == 40
    slots = 4 * 4  # experts * ceil(0.1 * 40)
    assert 40 * top_k - slots <= stats.dropped < 40 * top_k
    assert 0 < stats.entropy / 40 <= torch.tensor(4.0).log()


def test_padded_tokens_are_not_dispatched():
    layer = static_layer(eval_capacity_fraction=1.0).eval()
    x = torch.randn(1, 6, 16)
    padding = torch.tensor([[False] * 4 + [True] * 2])
    hidden = layer(x, padding).hidden
    assert (hidden[0, 4:] == 0).all() and (hidden[0, :4] != 0).any(-1).all()
    torch.testing.assert_close(hidden[:, :4], layer(x[:, :4]).hidden)


def test_evaluation_leaves_the_gate_alone_and_training_rescales_it():
    layer = static_layer()
    with torch.no_grad():
        layer.layer.gate.wg.mul_(3)
    before = layer.layer.gate.wg.clone()
    layer.eval()(torch.randn(1, 6, 16))
    assert torch.equal(layer.layer.gate.wg, before)
    layer.train()(torch.randn(1, 6, 16))
    torch.testing.assert_close(layer.layer.gate.wg.norm(dim=1), torch.full((4,), 1.5))


def test_histc_is_restored_after_an_error():
    original = torch.histc
    with pytest.raises(RuntimeError, match="stop"), recorded_histc():
        assert torch.histc is not original
        raise RuntimeError("stop")
    assert torch.histc is original


def test_experts_count_in_the_gradient_norm():
    assert not any(hasattr(parameter, "expert") for parameter in static_layer().parameters())


@pytest.mark.parametrize("arch", ["smoe_lm_tiny", "xmoe_lm_tiny"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_model_trains(arch, top_k):
    model = small_model(arch, mhmoe_routing="torchscale", moe_top_k=top_k).train()
    logits, extra = model(token_rows([8, 5]))
    (logits.logsumexp(-1).sum() + losses_of(extra).sum()).backward()
    layer = model.decoder.layers[1].moe_layer
    assert isinstance(layer, StaticXMoE)
    assert all(parameter.grad is not None for parameter in layer.layer.gate.parameters())


@pytest.mark.parametrize(
    "arch, flags, message",
    [
        ("mhmoe_lm_tiny", {}, r"--mhmoe-heads-number \(4\) cannot be combined with --mhmoe-routing torchscale"),
        ("xmoe_lm_tiny", {"moe_top_k": 3}, r"--moe-top-k \(3\)"),
        ("xmoe_lm_tiny", {"activation_fn": "silu"}, r"--activation-fn \('silu'\)"),
        ("xmoe_lm_tiny", {"no_bias": True}, "--no-bias"),
        ("xmoe_lm_tiny", {"mhmoe_shared_expert_dim": 8}, "--mhmoe-shared-expert-dim"),
        ("xmoe_lm_tiny", {"mhmoe_router_preset": "p1"}, r"--mhmoe-router-normalize \('both'\)"),
        ("xmoe_lm_tiny", {"mhmoe_capacity_factor": 2.0}, "--mhmoe-capacity-factor"),
        ("xmoe_lm_tiny", {"mhmoe_gate_score": "sigmoid"}, r"--mhmoe-gate-score \('sigmoid'\)"),
        ("xmoe_lm_tiny", {"mhmoe_gate_scale": 2.5}, r"--mhmoe-gate-scale \(2.5\)"),
        ("xmoe_lm_tiny", {"mhmoe_balancing": "bias-sign"}, r"--mhmoe-balancing \('bias-sign'\)"),
        ("xmoe_lm_tiny", {"mhmoe_head_projection": "on"}, "--mhmoe-head-projection"),
    ],
)
def test_what_torchscale_has_not_is_refused(arch, flags, message):
    with pytest.raises(ValueError, match=message):
        small_model(arch, mhmoe_routing="torchscale", **flags)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="--mhmoe-routing torchscale runs in a single process, not 2"):
        static_layer()
