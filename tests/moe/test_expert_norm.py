"""Experts with a LayerNorm: the hand-written backward against autograd, one sub-token and one expert at a time."""

import moe_oracle
import pytest
import torch
import torch.nn.functional as F
from moe_oracle import relative_error

from mhmoe_fairseq.moe import MHMoEConfig, MHMoELayer
from mhmoe_fairseq.moe._expert_network import ExpertWeights
from mhmoe_fairseq.moe.cpu.inner import FusedInner, Inner, InnerSettings
from mhmoe_fairseq.moe.cpu.norm import NormedLinear, parameter_grads


def build(dtype=torch.float64, **changes):
    """A layer with sub-LN whose parameters are all far from their initial ones and zeros."""
    torch.manual_seed(0)
    fields = {"embed_dim": 16, "num_heads": 2, "num_experts": 5, "top_k": 2, "expert_ffn_dim": 12, **changes}
    layer = MHMoELayer(MHMoEConfig(expert_layernorm=True, **fields), backend="loop").to(dtype).eval()
    with torch.no_grad():
        for name, parameter in layer.experts.named_parameters():
            if parameter.dim() == 2:
                parameter.uniform_(-1, 1).add_(1.5 if name == "layernorm_weight" else 0)
    return layer


def gradients(layer, x, hidden):
    torch.manual_seed(9)
    named = {"x": x, **{name: p for name, p in layer.named_parameters() if p.requires_grad}}
    loss = (hidden * torch.randn_like(hidden)).sum()
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), grads)}


def assert_equals_oracle(layer, tokens, tolerance):
    torch.manual_seed(1)
    x = torch.randn(tokens, layer.config.embed_dim, dtype=layer.experts.fc1_weight.dtype, requires_grad=True)
    hidden, want = layer(x).hidden, moe_oracle.forward(layer, x)[0]
    assert relative_error(hidden, want) <= tolerance
    want_grads = gradients(layer, x, want)
    for name, got in gradients(layer, x, hidden).items():
        scale = max(float(want_grads[name].abs().max()), 1e-3)
        assert float((got - want_grads[name]).abs().max()) / scale <= tolerance, name


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu", "swiglu"])
@pytest.mark.parametrize("tokens, top_k, experts", [(1, 2, 5), (9, 2, 40), (7, 5, 5), (0, 2, 5)])
def test_equals_oracle(tokens, top_k, experts, activation, bias, dtype, tolerance):
    changes = {"top_k": top_k, "num_experts": experts, "activation": activation, "expert_bias": bias}
    if tokens == 0:
        layer = build(dtype, **changes)
        layer(torch.empty(0, 16, dtype=dtype, requires_grad=True)).hidden.sum().backward()
        assert all(not p.grad.any() for p in layer.experts.parameters())
    else:
        assert_equals_oracle(build(dtype, **changes), tokens, tolerance)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_pieces_sum_up(monkeypatch, activation):
    from mhmoe_fairseq.moe.cpu import loop as _expert_loop

    monkeypatch.setattr(_expert_loop, "_PIECE_ROWS", 3)
    assert_equals_oracle(build(num_experts=2, activation=activation), 10, 1e-10)


@pytest.mark.parametrize("frozen", ["fc2_weight", "fc2_bias", "layernorm_weight", "layernorm_bias"])
def test_frozen_parameters_leave_the_others_right(frozen):
    layer = build()
    getattr(layer.experts, frozen).requires_grad_(False)
    assert_equals_oracle(layer, 6, 1e-10)


@pytest.mark.parametrize("activation", ["gelu", "relu", "swiglu"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck_with_dropout(monkeypatch, dropout, activation):
    from mhmoe_fairseq.moe.cpu import loop as _expert_loop

    monkeypatch.setattr(_expert_loop, "_PIECE_ROWS", 4)
    sizes = {"embed_dim": 4, "num_experts": 2, "top_k": 2, "expert_ffn_dim": 4}
    layer = build(**sizes, activation=activation, activation_dropout=dropout).train()
    names = [name for name, _ in layer.experts.named_parameters()]

    def run(x, *parameters):
        torch.manual_seed(5)  # the same mask at every evaluation
        values = {f"experts.{name}": value for name, value in zip(names, parameters)}
        return torch.func.functional_call(layer, values, (x,)).hidden

    torch.manual_seed(3)
    inputs = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True)]
    inputs += [p.detach().clone().requires_grad_() for p in layer.experts.parameters()]
    assert torch.autograd.gradcheck(run, inputs)


KINDS = [(Inner, "relu"), (Inner, "gelu"), (FusedInner, "gelu")]


def normed_linear(kind, activation, rows, norm_w, norm_b, weight, bias, grad):
    """Output and gradients of input and parameters by ``Inner`` and ``NormedLinear``."""
    none = dict.fromkeys(ExpertWeights._fields)
    own = {"layernorm_weight": norm_w, "layernorm_bias": norm_b, "fc1_weight": weight.t(), "fc2_weight": weight}
    weights = ExpertWeights(**{**none, **own})
    inner, piece = kind(InnerSettings(activation, 0.0, 0), len(rows), rows, True), slice(0, len(rows))
    layer, hidden = NormedLinear.of(norm_w, norm_b, weight, bias), rows.clone()
    mean, rstd = torch.empty(2, len(rows), dtype=torch.promote_types(rows.dtype, torch.float32))
    output = torch.mm(inner.forward(weights, piece, hidden, None, (mean, rstd)), weight.t())
    layer.finish(output, rstd)
    scaled = grad * rstd[:, None].to(rows.dtype)
    torch.mm(scaled, weight, out=inner.grad_buffer(len(rows)))
    sums = layer.input_grad(scaled, rstd, (output * grad).sum(1), rows.size(1))
    centered, input_grad, _ = inner.backward(weights, piece, hidden, None, (mean, *sums))
    product, norm_grad, norm_bias_grad = scaled.t() @ centered, torch.empty_like(norm_w), torch.empty_like(norm_b)
    parameter_grads(product, grad.sum(0), (norm_w, norm_b, weight), norm_grad, norm_bias_grad)
    return output, input_grad, norm_grad, norm_bias_grad, product


def by_autograd(activation, rows, norm_w, norm_b, weight, bias, grad):
    leaves = [t.detach().clone().requires_grad_() for t in (rows, norm_w, norm_b, weight)]
    normed = F.layer_norm(getattr(F, activation)(leaves[0]), norm_w.shape, leaves[1], leaves[2])
    output = F.linear(normed, leaves[3], bias)
    return output, *torch.autograd.grad(output, leaves, grad)


@pytest.mark.parametrize("kind, activation", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [256, 203])  # whole vectors, and a row that ends within one
@pytest.mark.parametrize("mean", [0.0, 1.0, 30.0])
def test_as_exact_as_pytorchs_layer_norm(mean, width, dtype, kind, activation):
    """Against float64, with means up to 30 deviations away: at most 3 times the rounding error of autograd's path."""
    if kind is FusedInner and not FusedInner.applies(InnerSettings(activation, 0.0, 0), dtype):
        pytest.skip("the kernels are not built")
    torch.manual_seed(2)
    rows = torch.randn(40, width, dtype=torch.float64) + mean
    parameters = [torch.rand(width) + 0.5, torch.randn(width), torch.randn(24, width) / 16, torch.randn(24)]
    rounded = [t.to(dtype) for t in (rows, *parameters, torch.randn(40, 24))]
    exact = by_autograd(activation, *(t.double() for t in rounded))
    got, usual = normed_linear(kind, activation, *rounded), by_autograd(activation, *rounded)
    for ours, theirs, want in zip(got, usual, exact, strict=True):
        unit = torch.finfo(dtype).eps
        assert relative_error(ours.double(), want) <= 3 * max(relative_error(theirs.double(), want), unit)
