"""The layer under PyTorch's transformations: compilers, torch.func, forward mode, higher derivatives.

On a CPU the automatic backend is the loop, which can do none of the first three; it must notice, in every size. What is
asked for is compared with the plain layer, whose first gradients other tests compare with the oracle.
"""

import pytest
import torch
from moe_oracle import relative_error
from torch.autograd import forward_ad

from mhmoe_fairseq.moe import MHMoEConfig, MHMoELayer
from mhmoe_fairseq.moe.gate import GATES

DIM = 32
SIZES = [64, 1024, 4096]  # the last with buffers of more than 2 MiB, which the loop takes from its pool
VARIANTS = {
    "plain": {},
    "capacity": {"routing": "capacity", "router": "linear", "top_k": 1},
    **{name: {"routing": name} for name, gate in GATES.items() if gate.chooses_all},
    "swiglu": {"activation": "swiglu", "expert_bias": False, "shared_expert_dim": 16},
    "layernorm": {"expert_layernorm": True, "activation": "relu", "subtoken_residual": True},
    "everything": {"routing": "capacity", "activation": "swiglu", "expert_layernorm": True},
    "quantized": {"quantize_experts": True, "expert_layernorm": True, "shared_expert_dim": 16},
    "temperature": {"router_temperature": 0.3, "router_normalize": "both"},
}
# The temperature's gradient is a sum whose terms cancel; in float32 the plain layer has it to 1e-4 only.
COMPILED = [variant for variant in VARIANTS if variant != "temperature"]
variants = pytest.mark.parametrize("variant", VARIANTS)
sizes = pytest.mark.parametrize("tokens", SIZES)


def build(variant="plain", backend="auto", dtype=torch.float64, **changes):
    torch.manual_seed(0)
    base = {"embed_dim": DIM, "num_heads": 2, "num_experts": 4, "expert_ffn_dim": 24, "top_k": 2}
    layer = MHMoELayer(MHMoEConfig(**{**base, **VARIANTS[variant], **changes}), backend=backend).to(dtype)
    # Gates far from uniform and weights far from small: the second derivative is no rounding error.
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2)
    return layer


def inputs(tokens, dtype=torch.float64):
    """Tokens and a mask over the last quarter of them."""
    x = torch.randn(tokens, DIM, dtype=dtype, generator=torch.Generator().manual_seed(tokens))
    return x.requires_grad_(), torch.arange(tokens) >= tokens - tokens // 4


def loss_of(output):
    return output.hidden.sin().sum() + output.balance_loss + output.z_loss


def scalar(layer, mask=None):
    return lambda x: loss_of(layer(x, mask))


def gradients(layer, x, mask):
    tensors = [x, *layer.parameters()]
    return torch.autograd.grad(scalar(layer, mask)(x), tensors)


def assert_compiled_equals_eager(variant, backend, masked):
    layer = build(variant, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    # Sums in another order take a number on the edge between two of 255 steps to the other one: of a row in a thousand,
    # as float32 does against float64.
    most, rows = (5e-3, 5e-3) if (variant, backend) == ("quantized", "inductor") else (1e-5, 0)
    for tokens in SIZES:  # the second makes the sizes dynamic
        x, mask = inputs(tokens, torch.float32)
        mask = mask if masked else None
        ours, eager = compiled(x, mask).hidden, layer(x, mask).hidden
        assert relative_error(ours, eager) < most
        assert ((ours - eager).abs().amax(1) > 1e-5 * eager.abs().max()).double().mean() <= rows
        for ours, eager in zip(gradients(compiled, x, mask), gradients(layer, x, mask)):
            assert relative_error(ours, eager) < most, tokens


# ---------------------------------------------------------------------- compilers


@pytest.mark.parametrize("variant", ["everything", "quantized"])
def test_compiled_in_every_size(variant):
    assert_compiled_equals_eager(variant, "aot_eager", masked=True)


@pytest.mark.slow
@pytest.mark.parametrize("variant", COMPILED)
def test_compiled_by_inductor_in_every_size(variant):
    assert_compiled_equals_eager(variant, "inductor", masked=variant in ("everything", "swiglu"))


@pytest.mark.parametrize("variant", ["plain", "everything", "quantized"])
def test_exported_with_a_free_number_of_tokens(variant):
    layer = build(variant).eval()
    (x, mask), tokens = inputs(SIZES[0]), torch.export.Dim("tokens", min=2)
    program = torch.export.export(layer, (x.detach(), mask), dynamic_shapes=({0: tokens}, {0: tokens})).module()
    for size in SIZES:
        x, mask = inputs(size)
        assert relative_error(program(x.detach(), mask).hidden, layer(x, mask).hidden) < 1e-9


# ---------------------------------------------------------------------- torch.func and forward mode


@sizes
@variants
def test_func_grad_and_jvp_equal_autograd(variant, tokens):
    layer = build(variant)
    x, mask = inputs(tokens)
    loss, direction = scalar(layer, mask), torch.cos(torch.arange(x.numel(), dtype=x.dtype)).view_as(x)
    gradient = gradients(layer, x, mask)[0]
    assert relative_error(torch.func.grad(loss)(x.detach()), gradient) < 1e-9
    _, along = torch.func.jvp(loss, (x.detach(),), (direction,))
    assert relative_error(along, (gradient * direction).sum()) < 1e-9
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss(forward_ad.make_dual(x.detach(), direction))).tangent
    assert relative_error(tangent, (gradient * direction).sum()) < 1e-9


def test_func_grad_of_the_parameters():
    layer = build("everything")
    x, mask = inputs(64)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    found = torch.func.grad(lambda p: loss_of(torch.func.functional_call(layer, p, (x, mask))))(parameters)
    expected = torch.autograd.grad(loss_of(layer(x, mask)), list(layer.parameters()))
    for ours, reference in zip(found.values(), expected):
        assert relative_error(ours, reference) < 1e-9


@sizes
@pytest.mark.parametrize("variant", ["plain", "everything", "quantized"])
def test_vmap_equals_one_sample_after_the_other(variant, tokens):
    layer = build(variant)
    x, mask = inputs(tokens)
    x, mask = x.detach().view(4, -1, DIM), mask.view(-1, 4).t()  # some padding in each
    expected = torch.stack([layer(sample, padding).hidden for sample, padding in zip(x, mask)])
    assert relative_error(torch.func.vmap(lambda *sample: layer(*sample).hidden)(x, mask), expected) < 1e-9
    per_sample = torch.func.vmap(torch.func.grad(lambda *sample: layer(*sample).hidden.sin().sum()))(x, mask)
    for sample, padding, gradient in zip(x, mask, per_sample):
        leaf = sample.clone().requires_grad_()
        (expected,) = torch.autograd.grad(layer(leaf, padding).hidden.sin().sum(), leaf)
        assert relative_error(gradient, expected) < 1e-9


def test_a_batch_of_gradients_of_one_output():
    layer = build("everything")
    x, mask = inputs(64)
    hidden = layer(x, mask).hidden
    wanted = torch.randn(3, *hidden.shape, dtype=hidden.dtype, generator=torch.Generator().manual_seed(3))
    (found,) = torch.autograd.grad(hidden, x, wanted, is_grads_batched=True, retain_graph=True)
    expected = [torch.autograd.grad(hidden, x, one, retain_graph=True)[0] for one in wanted]
    assert relative_error(found, torch.stack(expected)) < 1e-9


# ---------------------------------------------------------------------- higher derivatives


def hessian_vector_products(layer, x, mask, seed=0):
    """Of input and parameters, in both ways of asking."""
    tensors = [x, *layer.parameters()]

    def product():
        torch.manual_seed(seed)
        first = torch.autograd.grad(scalar(layer, mask)(x), tensors, create_graph=True)
        return sum((gradient * gradient.detach().cos()).sum() for gradient in first)

    asked = torch.autograd.grad(product(), tensors, allow_unused=True, materialize_grads=True)
    for tensor in tensors:
        tensor.grad = None
    product().backward()
    for ours, accumulated in zip(asked, (tensor.grad for tensor in tensors)):
        assert relative_error(torch.zeros_like(ours) if accumulated is None else accumulated, ours) < 1e-12
    return asked


@pytest.mark.parametrize("backend, tokens", [("loop", 64), *(("auto", tokens) for tokens in SIZES)])
@variants
def test_hessian_vector_products_equal_those_of_blocked(variant, backend, tokens):
    x, mask = inputs(tokens)
    found, expected = (hessian_vector_products(build(variant, backend=b), x, mask) for b in (backend, "blocked"))
    assert max(relative_error(product, torch.zeros(())) for product in expected) > 0.1
    for ours, reference in zip(found, expected):
        assert relative_error(ours, reference) < 1e-8


@pytest.mark.parametrize("piece_rows", [1024, 7])
@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_second_derivatives_with_dropout_equal_finite_differences(variant, piece_rows, monkeypatch):
    """Dropout's masks are those of the forward pass, drawn again."""
    from mhmoe_fairseq.moe.cpu import loop as _expert_loop

    monkeypatch.setattr(_expert_loop, "_PIECE_ROWS", piece_rows)
    layer = build(variant, activation_dropout=0.4, dropout=0.2)
    x, direction = inputs(12)[0], torch.linspace(-1, 1, 12 * DIM, dtype=torch.float64).view(12, DIM)

    def gradient(x, create_graph=False):
        torch.manual_seed(7)
        return torch.autograd.grad(scalar(layer)(x), x, create_graph=create_graph)[0]

    (product,) = torch.autograd.grad((gradient(x, create_graph=True) * direction).sum(), x)
    step = 1e-6
    plus, minus = (gradient(x.detach().add(direction, alpha=sign * step).requires_grad_()) for sign in (1, -1))
    assert relative_error(product, (plus - minus) / (2 * step)) < 1e-6
    assert relative_error(gradient(x, create_graph=True), gradient(x)) < 1e-12


@pytest.mark.parametrize("frozen", [["fc1_weight", "fc2_bias"], ["fc2_weight"]])
def test_second_derivatives_with_frozen_parameters(frozen):
    layer = build("plain")
    for name in frozen:
        getattr(layer.experts, name).requires_grad_(False)
    x = inputs(16)[0]
    (first,) = torch.autograd.grad(scalar(layer)(x), x, create_graph=True)
    (found,) = torch.autograd.grad(first.sin().sum(), x)
    blocked = build("plain", backend="blocked")
    (first,) = torch.autograd.grad(scalar(blocked)(x), x, create_graph=True)
    assert relative_error(found, torch.autograd.grad(first.sin().sum(), x)[0]) < 1e-9


def test_third_derivatives_and_no_rows():
    layer = build("plain")
    torch.autograd.gradgradcheck(lambda x: layer(x).hidden, inputs(3)[0], atol=1e-5)
    x = inputs(2)[0]
    values = []
    for one in (layer, build("plain", backend="blocked")):
        derivative = scalar(one)(x)
        for _ in range(3):
            (derivative,) = torch.autograd.grad(derivative.sum(), x, create_graph=True)
        values.append(derivative)
    assert relative_error(*values) < 1e-9
    empty = torch.zeros(0, DIM, dtype=torch.float64, requires_grad=True)
    grads = torch.autograd.grad(layer(empty).hidden.sum(), [empty, *layer.experts.parameters()], create_graph=True)
    assert not any(gradient.any() for gradient in grads)


# ---------------------------------------------------------------------- asking for the loop


def test_the_loop_is_what_an_ordinary_call_takes(monkeypatch):
    """Noticing the transforms must not cost ordinary training its speed."""
    from mhmoe_fairseq.moe import experts

    layer, calls = build(), []
    monkeypatch.setattr(experts, "blocked_ffn", lambda *_: calls.append("blocked"))
    x = inputs(8)[0]
    layer(x).hidden.sum().backward()
    with torch.no_grad():
        layer(x)
    assert not calls and layer.experts._backend_for(x) == "loop"


def ways_to_ask(layer):
    x = inputs(8)[0].detach()
    yield "torch.func", lambda: torch.func.grad(scalar(layer))(x)
    yield "torch.func", lambda: torch.func.vmap(lambda x: layer(x).hidden)(x.view(2, 4, DIM))
    yield "torch.func", lambda: torch.func.jvp(scalar(layer), (x,), (x,))
    yield "torch.export", lambda: torch.export.export(layer, (x,))
    yield "torch.compile", lambda: torch.compile(layer, backend="eager")(x)
    yield "torch.jit.trace", lambda: torch.jit.trace(layer, x)

    def forward_mode():
        with forward_ad.dual_level():
            layer(forward_ad.make_dual(x, x))

    yield "forward-mode", forward_mode


def test_the_loop_says_what_it_cannot_do():
    torch._dynamo.reset()
    for named, ask in ways_to_ask(build(backend="loop")):
        with pytest.raises(ValueError, match=f"backend 'loop' cannot be used .*{named}.*: take 'auto' or 'blocked'"):
            ask()


class Foreign(torch.Tensor):
    """As quantised and sharded weights are."""


def test_weights_of_a_foreign_kind_are_left_to_blocked():
    for backend in ("auto", "loop"):
        layer = build(backend=backend)
        layer.experts.fc1_weight = torch.nn.Parameter(layer.experts.fc1_weight.detach().as_subclass(Foreign))
        assert type(layer.experts.fc1_weight) is Foreign
        if backend == "auto":
            x = inputs(8)[0]
            assert relative_error(layer(x).hidden.as_subclass(torch.Tensor), build()(x).hidden) < 1e-9
        else:
            with pytest.raises(ValueError, match="backend 'loop' cannot be used on a Foreign"):
                layer(inputs(8)[0])
