"""Ternary weights and inputs of eight bits: numbers computed by hand, gradients, precision, and packed weights."""

import copy
import math

import pytest
import torch
from moe_oracle import relative_error
from test_layer import build
from torch.autograd import forward_ad
from torch.nn.functional import linear

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.moe.quantize import (
    TernaryLinear,
    pack,
    packed_state,
    quantize_activation,
    quantize_weight,
    ternary,
    ternary_names,
    unpack,
)

W = torch.tensor([[0.1, -0.5], [0.9, 0.02]])
VARIANTS = {
    "experts": {"expert_layernorm": True},
    "swiglu": {"activation": "swiglu", "expert_bias": False, "shared_expert_dim": 20},
}
FIELDS = {"embed_dim": 32, "quantize_experts": True}


def test_weights_by_hand():
    values, scale = ternary(W)
    assert values.tolist() == [[0, -1], [1, 0]] and scale.item() == pytest.approx(0.38)
    torch.testing.assert_close(quantize_weight(W), torch.tensor([[0.0, -0.38], [0.38, 0.0]]))


def test_activations_by_hand():
    """63.5 is rounded half to even, 64."""
    x = torch.tensor([1.0, -2.0, 0.5, 0.0])
    assert (quantize_activation(x) * 63.5).round().tolist() == [64, -127, 32, 0]
    torch.testing.assert_close(quantize_activation(x), torch.tensor([1.007874, -2.0, 0.503937, 0.0]))
    assert torch.equal(quantize_activation(torch.stack([x, 8 * x]))[1], 8 * quantize_activation(x))


def test_shares_of_zeros_and_errors():
    torch.manual_seed(0)
    gaussian, uniform = torch.randn(1500, 1500, dtype=torch.float64), torch.rand(1500, 1500, dtype=torch.float64) - 0.5
    expected = math.erf(0.5 * math.sqrt(2 / math.pi) / math.sqrt(2))
    assert expected == pytest.approx(0.31006, abs=1e-5)
    assert (ternary(gaussian)[0] == 0).double().mean().item() == pytest.approx(expected, abs=1e-3)
    assert (ternary(uniform)[0] == 0).double().mean().item() == pytest.approx(0.25, abs=1e-3)
    error = (quantize_weight(gaussian) - gaussian).square().sum() / gaussian.square().sum()
    assert error.item() == pytest.approx(0.263, abs=1e-3)
    rows = torch.randn(200, 512)
    assert 0.005 < ((quantize_activation(rows) - rows).norm() / rows.norm()).item() < 0.009


def test_zeros_stay_zeros():
    assert quantize_weight(torch.zeros(3, 4, 4)).eq(0).all() and quantize_activation(torch.zeros(2, 4)).eq(0).all()
    layer = TernaryLinear(4, 4)
    torch.nn.init.zeros_(layer.weight)
    assert torch.equal(layer(torch.zeros(4)), layer.bias)


def test_rounding_twice_is_another_scale():
    once = quantize_weight(torch.randn(64, 64))
    assert not torch.allclose(quantize_weight(once), once)
    zeros = (once == 0).float().mean()
    torch.testing.assert_close(ternary(once)[1].squeeze(), once.abs().max() * (1 - zeros))


def test_gradients_pass_the_rounding_and_the_clip():
    weight = torch.tensor([[10.0, 0.1], [-0.1, 0.2]], requires_grad=True)  # 10 is clipped
    x = torch.randn(3, 5, requires_grad=True)
    quantize_weight(weight).sum().backward()
    quantize_activation(x).sum().backward()
    assert torch.equal(weight.grad, torch.ones(2, 2)) and torch.equal(x.grad, torch.ones(3, 5))


def test_forward_mode_needs_no_gradients():
    x, direction = torch.randn(3, 5), torch.randn(3, 5)
    with torch.no_grad(), forward_ad.dual_level():
        for rounded in (quantize_weight, quantize_activation):
            tangent = forward_ad.unpack_dual(rounded(forward_ad.make_dual(x, direction))).tangent
            assert torch.equal(tangent, direction)


def test_experts_are_rounded_separately():
    torch.manual_seed(0)
    stack = torch.randn(3, 8, 8)
    louder = stack * torch.tensor([1.0, 100.0, 1.0]).view(3, 1, 1)
    before, after = quantize_weight(stack), quantize_weight(louder)
    assert torch.equal(before[[0, 2]], after[[0, 2]]) and not torch.equal(before[1], after[1])
    assert torch.equal(before[1], quantize_weight(stack[1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_in_float32_whatever_the_input(dtype):
    x = torch.randn(16, 64).to(dtype)
    assert quantize_weight(x).dtype == torch.float32 and quantize_activation(x).dtype == dtype
    assert torch.equal(quantize_weight(x), quantize_weight(x.float()))
    assert torch.equal(quantize_activation(x), quantize_activation(x.float()).to(dtype))


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_whole_numbers_multiplied_first_give_the_same(dtype, limit):
    layer = TernaryLinear(512, 32, bias=False).to(dtype)
    x = torch.randn(20, 512, dtype=dtype)
    values, gamma = ternary(layer.weight)
    scale = 127 / x.abs().amax(-1, keepdim=True)
    numbers = (x * scale).round()
    total = linear(numbers.long().to(torch.float64), values.double())
    assert total.abs().max() <= 128 * 512
    assert relative_error(layer(x), (total * gamma.double() / scale.double()).to(dtype)) < limit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_products_alone(dtype):
    torch.manual_seed(0)
    layer, x = build(torch.float32, **FIELDS), torch.randn(9, 32)
    chosen = layer(x).stats.expert_load
    with torch.autocast("cpu", dtype=dtype):
        output = layer(x)
    assert output.hidden.dtype == dtype and torch.equal(output.stats.expert_load, chosen)
    assert relative_error(output.hidden.float(), layer(x).hidden) < 0.05
    linear = TernaryLinear(32, 8)
    with torch.autocast("cpu", dtype=dtype):
        assert linear(x).dtype == dtype
    assert relative_error(linear(x.to(dtype).float()), linear(x)) < 0.05


# ---------------------------------------------------------------------- packed


def test_packing_by_hand():
    rows = torch.tensor([0, -1, 1, 1, 0, -1, 1, 0]).view(8, 1)
    assert pack(rows).tolist() == [[153], [72]] and torch.equal(unpack(pack(rows)), rows.float())
    stack = torch.randint(-1, 2, (3, 12, 5))
    assert pack(stack).shape == (3, 3, 5) and torch.equal(unpack(pack(stack)), stack.float())


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_weights_give_the_same_outputs_to_the_last_bit(variant):
    layer, x = build(torch.float32, **FIELDS, **VARIANTS[variant]), torch.randn(9, 32)
    names = ternary_names(layer)
    assert {"experts.fc1_weight", "experts.fc2_weight"} <= set(names)
    assert ("shared_expert.gate.weight" in names) == ("experts.gate_weight" in names) == (variant == "swiglu")
    state = packed_state(layer.state_dict(), names)
    other = build(torch.float32, seed=5, **FIELDS, **VARIANTS[variant])
    other.load_state_dict(state)
    fixed = copy.deepcopy(layer)
    for part in (fixed.experts, *([] if fixed.shared_expert is None else fixed.shared_expert.children())):
        part.fix_weights()
    for same in (other, fixed):
        assert torch.equal(same(x).hidden, layer(x).hidden)
        again = same.state_dict()  # it saves what it was opened from
        assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)
    assert sum(state[name].nbytes for name in names) * 16 == sum(layer.state_dict()[name].nbytes for name in names)


def test_packed_weights_without_their_scales_are_refused():
    layer = build(torch.float32, **FIELDS)
    state = packed_state(layer.state_dict(), ternary_names(layer))
    del state["experts.fc2_weight_scale"]
    with pytest.raises(UserError, match="experts.fc2_weight is packed, but there is no experts.fc2_weight_scale"):
        layer.load_state_dict(state)


def test_packed_weights_are_for_evaluation():
    layer = build(torch.float32, **FIELDS)
    latent = layer.state_dict()
    layer.load_state_dict(packed_state(latent, ternary_names(layer)))
    with pytest.raises(UserError, match="packed 1.58-bit weights cannot be trained"):
        layer.train()(torch.randn(2, 32))
    layer.load_state_dict(latent)  # latent ones again
    layer(torch.randn(2, 32)).hidden.sum().backward()
    assert layer.experts.fc1_weight.grad.any()


def test_rows_that_do_not_fit_into_bytes_are_refused():
    with pytest.raises(UserError, match="experts.fc1_weight has 6 rows: packed are matrices with a multiple of 4"):
        layer = build(torch.float32, expert_ffn_dim=6, **FIELDS)
        packed_state(layer.state_dict(), ternary_names(layer))
