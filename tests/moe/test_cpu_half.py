"""Experts on a CPU in half precision: rounded numbers of rows, kernels, and how exact it all is."""

import itertools
from collections.abc import Iterator

import moe_oracle
import pytest
import torch
from moe_oracle import relative_error
from torch import Tensor

from mhmoe_fairseq.moe import MHMoEConfig, MHMoELayer
from mhmoe_fairseq.moe.cpu import inner, kernels, loop
from mhmoe_fairseq.moe.cpu.rounding import lay_out, row_multiple
from mhmoe_fairseq.moe.dispatch import plan_dispatch

VARIANTS = {
    "gelu": {},
    "norm": {"expert_layernorm": True},
    "relu": {"activation": "relu", "expert_layernorm": True, "expert_bias": False},
    "swiglu": {"activation": "swiglu"},
}


@pytest.fixture(params=["kernels", "operations"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "operations":
        monkeypatch.setattr(kernels, "load", lambda: False)
    elif not kernels.load():
        pytest.skip("the kernels are not built")
    return request.param


def build(**changes: object) -> MHMoELayer:
    torch.manual_seed(0)
    fields = {"embed_dim": 32, "num_heads": 2, "num_experts": 5, "top_k": 2, "expert_ffn_dim": 44, **changes}
    return MHMoELayer(MHMoEConfig(**fields), backend="loop")


# ---------------------------------------------------------------------- rows


@pytest.mark.parametrize("multiple", [1, 2, 4, 16])
@pytest.mark.parametrize("top_k", [1, 3])
def test_rows_are_laid_out(multiple: int, top_k: int) -> None:
    torch.manual_seed(multiple)
    experts = torch.randint(0, 6, (23, top_k))
    experts[experts == 2] = 3  # an idle one; 5 is the virtual expert
    plan = plan_dispatch(experts, 5, all_real=False)
    layout = lay_out(plan, multiple)
    bounds = list(itertools.pairwise([0, *layout.ends]))
    assert all((end - start) % multiple == 0 for start, end in bounds)
    flat = experts.flatten()
    of_row = flat[layout.plan.order_R]
    for expert, (start, end) in enumerate(bounds):
        assert end - start == -(-int((flat == expert).sum()) // multiple) * multiple
        assert (of_row[start:end] == expert).all()
    assert (of_row[layout.ends[-1] :] == 5).all()
    # Every expert's row has its own place, with its own weight; the virtual expert's share one, the added have none.
    gates, is_real, places = torch.rand(23, top_k), flat < 5, layout.plan.inverse_R
    placed = layout.gates(gates)
    assert torch.equal(layout.plan.order_R[places][is_real], torch.arange(flat.numel())[is_real])
    assert torch.equal(placed[places][is_real], gates.flatten()[is_real])
    assert (places[~is_real] == layout.ends[-1]).all() and placed.count_nonzero() == flat.numel()


def test_pieces_cover_the_rows_in_order() -> None:
    layout = lay_out(plan_dispatch(torch.tensor([[0]] * 5 + [[2]] * 2), 3, all_real=True), 2)
    assert layout.pieces(4) == [(0, [slice(0, 4), slice(4, 6)]), (2, [slice(6, 8)])]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("padded", [False, True])
def test_added_rows_reach_nothing(monkeypatch: pytest.MonkeyPatch, variant: str, padded: bool) -> None:
    """In float64, where they stand out: outputs, losses and all gradients are the oracle's."""
    monkeypatch.setattr(loop, "row_multiple", lambda *_: 8)
    monkeypatch.setattr(loop, "_PIECE_ROWS", 8)
    layer = build(**VARIANTS[variant]).double()
    x = torch.randn(9, 32, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([False, True, False] * 3) if padded else None
    output, want = layer(x, mask), moe_oracle.forward(layer, x, mask)
    assert output.stats.expert_load.sum() == (6 if padded else 9) * 2 * 2
    inputs = [x, *layer.parameters()]
    grads = [torch.autograd.grad((y * y).sum() + balance, inputs) for y, balance in (output[:2], want[:2])]
    for got, expected in zip([*output[:2], *grads[0]], [*want[:2], *grads[1]], strict=True):
        assert relative_error(got, expected) <= 1e-10


@pytest.mark.parametrize(
    "dtype, rows, experts, multiple",
    [
        (torch.float32, 16384, 8, 1),
        (torch.bfloat16, 16384, 8, 64),
        (torch.bfloat16, 16384, 35, 32),
        (torch.float16, 4096, 35, 8),
        (torch.bfloat16, 16, 35, 1),  # a step of one token
    ],
)
def test_how_rows_are_rounded(dtype: torch.dtype, rows: int, experts: int, multiple: int) -> None:
    assert row_multiple(dtype, rows, experts) == multiple


def test_products_have_few_shapes() -> None:
    """Each new shape is compiled anew; loads differ from step to step."""
    shapes = set()
    for step in range(20):
        torch.manual_seed(step)
        plan = plan_dispatch(torch.randint(0, 16, (4096, 2)), 16, all_real=True)
        layout = lay_out(plan, row_multiple(torch.bfloat16, 8192, 16))
        shapes |= {piece.stop - piece.start for _, pieces in layout.pieces(1024) for piece in pieces}
        assert layout.ends[-1] < 8192 * 1.08
    assert len(shapes) <= 4


# ---------------------------------------------------------------------- exactness


def plain_loop(layer: MHMoELayer, x: Tensor, gates: Tensor, experts: Tensor) -> Tensor:
    """Autograd's loop over experts, in the weights' and the input's dtype."""
    weights = dict(layer.experts.named_parameters())
    total = torch.zeros_like(x)
    for expert in range(layer.config.num_experts):
        row, choice = torch.where(experts == expert)
        of_expert = {name: value[expert] for name, value in weights.items()}
        y = network(of_expert, layer.config, x[row])
        total = total.index_add(0, row, y * gates[row, choice, None].to(y.dtype))
    return total


def network(weights: dict[str, Tensor], config: MHMoEConfig, x: Tensor) -> Tensor:
    def linear(name: str, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, weights[f"{name}_weight"], weights.get(f"{name}_bias"))

    hidden = linear("fc1", x)
    functions = torch.nn.functional
    if config.activation == "swiglu":
        hidden = functions.silu(hidden) * linear("gate", x)
    else:
        hidden = getattr(functions, config.activation)(hidden)
    if config.expert_layernorm:
        norm = weights["layernorm_weight"], weights["layernorm_bias"]
        hidden = functions.layer_norm(hidden, hidden.shape[-1:], *norm)
    return linear("fc2", hidden)


def passes(layer: MHMoELayer, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """Output and gradients: ours under autocast, then the plain loop's in ``dtype``, then in float64."""
    torch.manual_seed(3)
    config = layer.config
    x, gates = torch.randn(300, config.subtoken_dim).to(dtype), torch.rand(300, config.top_k)
    experts = torch.rand(300, config.num_experts).topk(config.top_k, dim=1).indices
    grad = torch.randn(300, config.subtoken_dim).to(dtype)
    for kind in (None, dtype, torch.float64):
        leaves = [
            x.clone() if kind is None else x.to(kind),
            gates.to(torch.float64 if kind == torch.float64 else gates.dtype),
        ]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        if kind is None:
            with torch.autocast("cpu", dtype=dtype):
                plan = plan_dispatch(experts, config.num_experts, all_real=True)
                y, _ = layer.experts(*leaves, plan)
        else:
            layer = layer.to(dtype).to(kind)  # rounded
            y = plain_loop(layer, *leaves, experts)
        named = dict(layer.experts.named_parameters())
        grads = torch.autograd.grad(y, [*leaves, *named.values()], grad.to(y.dtype))
        yield {"output": y, **dict(zip(["x", "gates", *named], grads, strict=True))}


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("piece_rows", [1024, 32])
def test_half_precision_is_as_exact_as_a_plain_loop(
    monkeypatch: pytest.MonkeyPatch, variant: str, piece_rows: int
) -> None:
    """Against float64 on the rounded weights and inputs: at most twice the error of autograd's loop in bfloat16."""
    monkeypatch.setattr(loop, "_PIECE_ROWS", piece_rows)
    layer = build(**VARIANTS[variant])
    ours, plain, exact = passes(layer, torch.bfloat16)
    for name, want in exact.items():
        limit = max(relative_error(plain[name].double(), want), torch.finfo(torch.bfloat16).eps / 4)
        assert relative_error(ours[name].double(), want) <= 2 * limit, name
        if name not in ("output", "x"):
            assert ours[name].dtype == torch.float32, name  # summed in the weights' own dtype


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_pass_without_gradients_computes_the_same(monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    monkeypatch.setattr(loop, "_PIECE_ROWS", 32)
    layer, x = build(**VARIANTS[variant]).eval(), torch.randn(200, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = layer(x).hidden
        with torch.no_grad():
            assert torch.equal(layer(x).hidden, kept)


def test_a_pass_without_gradients_keeps_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """And casts the weights of experts that have rows alone."""
    shapes, layer = [], build(num_experts=64, top_k=1)
    taken = loop._cpu_memory.empty
    monkeypatch.setattr(loop, "_PIECE_ROWS", 16)
    monkeypatch.setattr(loop, "_FEW_ROWS", 0)
    monkeypatch.setattr(loop._cpu_memory, "empty", lambda shape, like: shapes.append(shape) or taken(shape, like))
    casts, cast = [], loop._cast
    monkeypatch.setattr(loop, "_cast", lambda weights, dtype: casts.append(weights) or cast(weights, dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        used = (layer(torch.randn(20, 32)).stats.expert_load > 0).sum()
    assert max(rows for rows, width in shapes[:1]) == 16
    assert len(casts) == used < 64 and all(weights.fc1_weight.dim() == 2 for weights in casts)


def test_no_cast_weights_are_kept_for_the_backward() -> None:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            build(expert_layernorm=True)(torch.randn(24, 32))
    kept_half = [tuple(t.shape) for t in kept if t.dtype == torch.bfloat16]
    assert any(shape[1:] == (44,) for shape in kept_half)  # pre-activations
    assert not [shape for shape in kept_half if len(shape) > 2]


# ---------------------------------------------------------------------- kernels


@pytest.mark.skipif(not kernels.load(), reason="the kernels are not built")
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 6e-4)])
@pytest.mark.parametrize("width", [1, 31, 64, 333])
@pytest.mark.parametrize("bias", [False, True])
def test_kernels_compute_gelu(width: int, bias: bool, dtype: torch.dtype, limit: float) -> None:
    """Values and slopes to ``limit``, apart from rounding the result, which in bfloat16 is coarser than that."""
    hidden = torch.linspace(-12, 12, 40 * width).view(width, 40).t().contiguous().to(dtype)
    grad, vectors = torch.full_like(hidden, 2.0), (torch.ones(width) if bias else None, None)
    wide = (hidden.double() + bias).requires_grad_()
    want = torch.nn.functional.gelu(wide)
    (slope,) = torch.autograd.grad(want.sum(), wide)
    out, again = torch.empty_like(hidden), torch.empty_like(hidden)
    torch.ops.mhmoe_cpu.gelu_norm(hidden, *vectors, out, None, None)
    torch.ops.mhmoe_cpu.gelu_norm_backward(hidden, *vectors, grad, again, None, None, None)
    assert torch.equal(out, again)
    for got, exact in ((out, want), (grad, 2 * slope)):
        error = (got.double() - exact).abs() - exact.abs() * torch.finfo(dtype).eps / 2
        assert error.max() <= 2 * limit


@pytest.mark.skipif(not kernels.load(), reason="the kernels are not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_far_from_zero(dtype: torch.dtype) -> None:
    hidden = torch.tensor([[1e4, -1e4, 0.0, float("nan")]]).to(dtype)
    out, grad = torch.empty_like(hidden), torch.ones_like(hidden)
    torch.ops.mhmoe_cpu.gelu_norm(hidden, None, None, out, None, None)
    torch.ops.mhmoe_cpu.gelu_norm_backward(hidden, None, None, grad, out, None, None, None)
    torch.testing.assert_close(
        out, torch.tensor([[1e4, 0.0, 0.0, float("nan")]]), equal_nan=True, atol=0.02, rtol=4e-3, check_dtype=False
    )
    torch.testing.assert_close(grad[0, :3], torch.tensor([1.0, 0.0, 0.5]), atol=1e-5, rtol=0, check_dtype=False)


@pytest.mark.parametrize("variant", ["gelu", "norm", "plain"])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("padded", [False, True])
def test_few_rows_are_computed_one_by_one(
    monkeypatch: pytest.MonkeyPatch, variant: str, dtype: torch.dtype, limit: float, padded: bool
) -> None:
    if not kernels.load():
        pytest.skip("the kernels are not built")
    layer = build(**{"plain": {"expert_bias": False}, **VARIANTS}[variant], num_experts=8).eval()
    x, mask = torch.randn(3, 32), torch.tensor([False, True, False]) if padded else None
    want = moe_oracle.forward(layer, x, mask)[0]
    calls, whole = [], loop._whole_experts
    monkeypatch.setattr(loop, "_whole_experts", lambda *args: calls.append(1) or whole(*args))
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32), torch.no_grad():
        few = layer(x, mask).hidden
        monkeypatch.setattr(loop, "_FEW_ROWS", 0)
        many = layer(x, mask).hidden
    assert calls == [1]
    assert relative_error(few.float(), want) <= limit and relative_error(many.float(), want) <= limit


def test_kernels_are_taken_where_they_know_the_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "load", lambda: True)
    settings = inner.InnerSettings("gelu", 0.0, 0)
    assert inner.FusedInner.applies(settings, torch.bfloat16) and inner.FusedInner.applies(settings, torch.float32)
    others = (
        settings._replace(activation="relu"),
        settings._replace(activation="swiglu"),
        settings._replace(dropout=0.1),
    )
    assert not any(inner.FusedInner.applies(other, torch.float32) for other in others)
    assert not inner.FusedInner.applies(settings, torch.float64) and not inner.FusedInner.applies(
        settings, torch.float16
    )


@pytest.mark.parametrize("compiler, reason", [("no-such-compiler", "No such file"), ("false", "no message")])
def test_kernels_that_cannot_be_built(monkeypatch, tmp_path, compiler: str, reason: str) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(kernels, "library", lambda: tmp_path / "kernels.so")
    with pytest.raises(RuntimeError, match=f"{compiler}: {reason}"):
        kernels.build()
    assert not list(tmp_path.iterdir())


def test_kernels_of_another_source_or_pytorch_are_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    here = kernels.library()
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert kernels.library() != here
