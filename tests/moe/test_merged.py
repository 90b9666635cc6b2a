"""Merged experts: SMEAR and Lory against a loop over tokens, by hand, in pieces, counted, and as PyTorch's citizens."""

import dataclasses
import itertools

import pytest
import torch
from moe_oracle import feed_forward
from torch.utils.flop_counter import FlopCounterMode

from mhmoe_fairseq.moe import ConfigError, LoryLayer, MergedConfig, SMEARLayer
from mhmoe_fairseq.moe.layer import taken_for_padding
from mhmoe_fairseq.moe.merged import MERGINGS
from mhmoe_fairseq.moe.stats import active_share, effective_share

DIM, EXPERTS, SEGMENT = 6, 3, 4
LENGTHS = (11, 4, 1, 8, 0)
NETWORKS = {
    "plain": {"activation": "relu"},
    "no-bias": {"activation": "relu", "expert_bias": False},
    "subln": {"activation": "gelu", "expert_layernorm": True},
    "swiglu": {"activation": "swiglu", "expert_layernorm": True},
}


def layer_of(routing: str, **changes):
    router = "layernorm" if routing == "smear" else "linear"
    fields = {"embed_dim": DIM, "num_experts": EXPERTS, "expert_ffn_dim": 5, "router": router, "routing": routing}
    config = MergedConfig(**{**fields, "segment_length": SEGMENT, **changes})
    torch.manual_seed(0)
    layer = MERGINGS[routing](config).double().eval()
    for parameter in layer.parameters():  # norms and biases, too; a router that does not begin uniform
        torch.nn.init.normal_(parameter)
    return layer


def batch(side: str = "right"):
    """Rows of different lengths, padded with what spoils every sum that it enters."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(LENGTHS), max(LENGTHS), DIM, generator=generator, dtype=torch.float64)
    positions = torch.arange(max(LENGTHS))
    mask = positions >= torch.tensor(LENGTHS).unsqueeze(1)
    mask = mask if side == "right" else mask.flip(1)
    return x.masked_fill(mask.unsqueeze(2), torch.nan), mask


def router_logits(layer, mean):
    if layer.config.router == "linear":
        return layer.router.weight @ mean
    router = layer.router

    def norm(vector, scale, shift):
        centred = vector - vector.mean()
        return centred / (centred.square().mean() + 1e-5).sqrt() * scale + shift

    mean = norm(mean, router.input_scale, router.input_shift)
    return torch.stack([norm(row, router.expert_scale, router.expert_shift) @ mean for row in router.expert_weight])


def oracle(layer, tokens):
    """Outputs and routing weights of one sequence's real tokens, one after the other."""
    config, outputs, weights = layer.config, [], []
    for position, token in enumerate(tokens):
        if config.routing == "smear":
            logits = router_logits(layer, sum(tokens) / len(tokens))
        elif position < SEGMENT:
            logits = layer.first_E
        else:
            start = (position // SEGMENT - 1) * SEGMENT
            logits = router_logits(layer, sum(tokens[start : start + SEGMENT]) / SEGMENT)
        probs = logits.exp() / logits.exp().sum()
        merged = {
            name: sum(p * expert for p, expert in zip(probs, stacked))
            for name, stacked in layer.experts.named_parameters()
        }
        outputs.append(feed_forward(merged, config.activation, config.expert_layernorm, token, False))
        weights.append(probs)
    return outputs, weights


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("routing", MERGINGS)
def test_outputs_and_all_gradients_are_those_of_a_loop_over_tokens(routing, network, side):
    layer, (x, mask) = layer_of(routing, **NETWORKS[network]), batch(side)
    x.requires_grad_()
    inputs = [x, *layer.parameters()]
    output = layer(x, mask)
    factors = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    actual = torch.autograd.grad((output.hidden * factors)[~mask].sum(), inputs)

    loss, load, entropy = 0, torch.zeros(EXPERTS, dtype=x.dtype), 0
    for row, row_mask, hidden, factor in zip(x, mask, output.hidden, factors):
        expected, weights = oracle(layer, list(row[~row_mask]))
        for one, other in zip(hidden[~row_mask], expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
        loss = loss + sum((f * e).sum() for f, e in zip(factor[~row_mask], expected))
        load = load + sum(weights)
        entropy = entropy - sum((p * p.log()).sum() for p in weights)
    for one, other in zip(actual, torch.autograd.grad(loss, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    assert not actual[0][mask].any() and torch.isfinite(output.hidden).all()
    torch.testing.assert_close(output.stats.expert_load, load.float())
    torch.testing.assert_close(output.stats.entropy, entropy.float())
    assert output.stats.num_subtokens == sum(LENGTHS) and output.stats.dropped == 0
    assert output.balance_loss == 0 == output.z_loss


def test_by_hand():
    layer = layer_of("smear", embed_dim=1, num_experts=2, expert_ffn_dim=1, activation="relu", expert_bias=False)
    with torch.no_grad():
        layer.experts.fc1_weight.copy_(torch.tensor([1.0, 3.0]).view(2, 1, 1))
        layer.experts.fc2_weight.copy_(torch.tensor([2.0, -1.0]).view(2, 1, 1))
    y = layer.experts(torch.tensor([[[1.0], [-1.0], [2.0]]]).double(), torch.tensor([[0.75, 0.25]]).double())
    assert y.flatten().tolist() == [1.875, 0.0, 3.75]  # an ensemble of outputs would give .75, 0, 1.5


@pytest.mark.parametrize("routing", MERGINGS)
def test_identical_experts_make_routing_meaningless(routing):
    layer, (x, mask) = layer_of(routing), batch()
    with torch.no_grad():
        for stacked in layer.experts.parameters():
            stacked.copy_(stacked[:1].expand_as(stacked))
    before = layer(x, mask).hidden
    for parameter in layer.router.parameters():
        torch.nn.init.normal_(parameter)
    torch.testing.assert_close(layer(x, mask).hidden, before, rtol=0, atol=1e-12)


def test_all_weight_on_one_expert_is_that_expert():
    layer = layer_of("lory", activation="gelu", expert_layernorm=True)
    x = torch.randn(1, 5, DIM, dtype=torch.float64)
    for expert in range(EXPERTS):
        weights = {name: stacked[expert] for name, stacked in layer.experts.named_parameters()}
        y = layer.experts(x, torch.eye(EXPERTS, dtype=x.dtype)[expert : expert + 1])
        for token, one in zip(x[0], y[0]):
            torch.testing.assert_close(one, feed_forward(weights, "gelu", True, token, False), rtol=0, atol=1e-12)


@pytest.mark.parametrize("routing", MERGINGS)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_nothing_is_merged_for_nothing(routing, shape):
    output = layer_of(routing)(torch.zeros(*shape, DIM, dtype=torch.float64))
    assert output.hidden.shape == (*shape, DIM) and torch.isfinite(output.balance_loss)


def test_first_segments_begin_with_equal_weights():
    layer = LoryLayer(MergedConfig(embed_dim=DIM, num_experts=EXPERTS, expert_ffn_dim=5, segment_length=SEGMENT))
    load = layer(torch.randn(2, SEGMENT, DIM)).stats.expert_load
    torch.testing.assert_close(load, torch.full((EXPERTS,), 2 * SEGMENT / EXPERTS))
    assert active_share(load) == 1 and effective_share(load) == pytest.approx(1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pieces", [[1] * 11, [4, 1, 1, 4, 1], [3, 6, 2], [11], [1, 10], [0, 5, 0, 6]])
def test_pieces_of_sequences_equal_the_whole(pieces, side):
    layer, (x, mask) = layer_of("lory"), batch(side)
    whole, memory, done, loads = layer(x, mask), layer.new_memory(), 0, 0
    rows = torch.arange(len(LENGTHS))
    for size in pieces:
        rows = rows.flip(0)  # beams change places between the steps, and one goes on twice
        memory.reorder(torch.tensor([4, 3, 2, 1, 0, 0]) if done == 0 else torch.tensor([4, 3, 2, 1, 0, 5]))
        rows = torch.cat([rows[:5], rows[4:5]]) if len(rows) == 5 else torch.cat([rows[1:], rows[:1]])
        piece = slice(done, done + size)
        output = layer(x[rows, piece], mask[rows, piece], memory)
        kept = ~mask[rows, piece]
        torch.testing.assert_close(output.hidden[kept], whole.hidden[rows, piece][kept], rtol=1e-10, atol=1e-12)
        loads, done = loads + output.stats.num_subtokens, done + size
    assert done == x.size(1)


@pytest.mark.parametrize("routing", MERGINGS)
def test_counts_are_those_of_the_layer_and_of_its_products(routing):
    for network, experts in itertools.product(NETWORKS.values(), (1, 5)):
        changes = {"embed_dim": 8, "expert_ffn_dim": 12, "num_experts": experts, **network}
        layer = layer_of(routing, **changes)
        counts = layer.counts()
        assert counts.params == counts.active_params == sum(parameter.numel() for parameter in layer.parameters())
        assert counts.expert_params == sum(parameter.numel() for parameter in layer.experts.parameters())
        segments = 3 if routing == "lory" else 1
        length = SEGMENT * segments
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(2, length, 8, dtype=torch.float64))
        assert counter.get_total_flops() == pytest.approx(counts.flops_per_token * 2 * length, abs=length)


def test_experts_are_left_out_in_training_only():
    layer = layer_of("smear", num_experts=50)
    layer.router.reset_parameters()  # close to uniform: none of the weights is small by itself
    x = torch.randn(40, 3, DIM, dtype=torch.float64)
    probs = []
    layer.experts.register_forward_hook(lambda module, given, output: probs.append(given[1].detach()))
    state = torch.random.get_rng_state()
    layer(x)
    assert torch.equal(torch.random.get_rng_state(), state)
    layer.train()(x)
    whole, thinned = probs
    left_out = thinned < 1e-9
    assert 0.07 < left_out.double().mean() < 0.13  # 2,000 draws of 0.1
    torch.testing.assert_close(thinned.sum(1), torch.ones(40, dtype=x.dtype))
    kept = whole.masked_fill(left_out, 0)
    torch.testing.assert_close(thinned.masked_fill(left_out, 0), kept / kept.sum(1, keepdim=True), rtol=1e-6, atol=1e-8)


def test_an_example_without_experts_takes_them_all_alike(monkeypatch):
    layer = layer_of("smear").train()
    monkeypatch.setattr(torch, "rand_like", torch.zeros_like)
    x = torch.randn(1, 3, DIM, dtype=torch.float64)
    torch.testing.assert_close(layer(x).stats.expert_load, torch.ones(EXPERTS))


@pytest.mark.parametrize("routing", MERGINGS)
def test_nothing_is_counted_of_a_call_for_company(routing):
    layer = layer_of(routing)
    with taken_for_padding(layer):
        output = layer(torch.randn(2, 5, DIM, dtype=torch.float64))
    assert output.stats.num_subtokens == 0 == output.stats.expert_load.sum()
    output.hidden.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in layer.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("routing", MERGINGS)
def test_half_precision_merges_by_weights_in_float32(routing):
    layer, (x, mask) = layer_of(routing, gating_fp32=True).float(), batch()
    x, seen = x.float().nan_to_num(), []
    layer.experts.register_forward_hook(lambda module, given, output: seen.append(given[1]))
    expected = layer(x, mask).hidden
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = layer(x, mask).hidden
    assert hidden.dtype == torch.bfloat16 and seen[1].dtype == torch.float32
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=1e-6)
    assert (hidden - expected)[~mask].abs().max() < 0.03 * expected[~mask].abs().max()


@pytest.mark.parametrize("routing", MERGINGS)
def test_compiled_it_is_the_same(routing):
    layer, (x, mask) = layer_of(routing), batch()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    eager, traced = layer(x, mask).hidden, compiled(x, mask).hidden
    torch.testing.assert_close(traced, eager, rtol=0, atol=1e-12)
    inputs = list(layer.parameters())
    for one, other in zip(*(torch.autograd.grad(y[~mask].sum(), inputs) for y in (traced, eager)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("routing", MERGINGS)
def test_a_layer_from_the_meta_device_begins_as_any_other(routing):
    config = layer_of(routing).config
    with torch.device("meta"):
        layer = MERGINGS[routing](config)
    layer.to_empty(device="cpu")
    torch.manual_seed(3)
    layer.reset_parameters()
    expected = MERGINGS[routing](config)
    torch.manual_seed(3)
    expected.reset_parameters()
    for (name, one), other in zip(layer.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other), name


REFUSED = {
    "num_heads": 2,
    "top_k": 2,
    "shared_expert_dim": 4,
    "subtoken_residual": True,
    "head_projection": True,
    "normalize_gates": False,
    "capacity_factor": 2.0,
    "balance_scope": "global",
    "balance_assignment": "topk",
    "balancing": "bias-sign",
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_needs_a_choice_of_experts_is_refused(field):
    with pytest.raises(ConfigError, match=rf"^{field} \(.*\) cannot be combined with routing lory: "):
        layer_of("lory", **{field: REFUSED[field]})


def test_names_and_numbers_are_checked():
    with pytest.raises(ConfigError, match=r"^routing \('dropless'\) must be one of smear, lory$"):
        MergedConfig(embed_dim=4, num_experts=2, expert_ffn_dim=4, routing="dropless")
    with pytest.raises(ConfigError, match=r"^segment_length \(0\)"):
        layer_of("lory", segment_length=0)
    assert dataclasses.replace(layer_of("lory").config, num_experts=1).num_params() > 0


def test_smear_needs_no_segments_and_lory_no_layer_norm():
    assert isinstance(layer_of("smear"), SMEARLayer) and not hasattr(layer_of("smear"), "new_memory")
    for router in ("linear", "xmoe", "layernorm"):
        assert torch.isfinite(layer_of("lory", router=router)(batch()[0], batch()[1]).hidden).all()
