"""Losses in chunks of rows against the plain way in float64: values, gradients, memory and number of products."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mhmoe_fairseq.models import cross_entropy
from mhmoe_fairseq.models.cross_entropy import predict

N, D, V, PAD = 37, 8, 50, 1
WEIGHTS = torch.linspace(-1, 2, N)
REDUCTIONS = {
    "sum": lambda losses: losses.sum(),
    "scaled": lambda losses: 3 * losses.sum() / 7,
    "weighted": lambda losses: (losses * WEIGHTS.to(losses)).sum(),
}


@pytest.fixture(autouse=True, params=[10, N])
def rows_at_once(request, monkeypatch):
    """Chunks of 10, 9, 9 and 9 rows, and all rows in one."""
    monkeypatch.setattr(cross_entropy, "_CHUNK_ROWS", request.param)
    monkeypatch.setattr(cross_entropy, "_CHUNK_BYTES", 0)
    return request.param


class Operators(TorchDispatchMode):
    """Counts the matrix products, and keeps the size of the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.largest = Counter[str](), 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.products[str(function).split(".")[1]] += "mm" in str(function)
        self.largest = max([self.largest, *(leaf.numel() for leaf in tree_leaves(result) if torch.is_tensor(leaf))])
        return result


def problem(
    bias: bool = True, dtype: torch.dtype = torch.float32, N: int = N, D: int = D, V: int = V
) -> tuple[Tensor, nn.Linear, Tensor]:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(D, V, bias, dtype=dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=generator)
    features = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[::5] = PAD
    return features, layer, targets


def gradients(loss: Tensor, features: Tensor, layer: nn.Linear, **kwargs: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, (features, *layer.parameters()), **kwargs)


def plain(features: Tensor, layer: nn.Linear, targets: Tensor, ignored: int | None) -> Tensor:
    log_probs = layer(features).log_softmax(-1, dtype=torch.promote_types(features.dtype, torch.float32))
    return F.nll_loss(log_probs, targets, ignore_index=-100 if ignored is None else ignored, reduction="none")


@torch.no_grad()
def errors(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ignored", [None, PAD])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("autocast", [False, True])
def test_values_and_gradients(bias, ignored, reduction, autocast):
    features, layer, targets = problem(bias)
    reduce = REDUCTIONS[reduction]
    exactly = features.detach().double().requires_grad_()
    exact_layer = nn.Linear(D, V, bias, dtype=torch.float64)
    exact_layer.load_state_dict(layer.state_dict())
    wanted = plain(exactly, exact_layer, targets, ignored)
    exact = wanted.detach(), *gradients(reduce(wanted), exactly, exact_layer)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = predict(features, layer, targets, ignored, with_best=True)
        usual = plain(features, layer, targets, ignored)
        best = layer(features).argmax(-1).eq(targets)
    assert torch.equal(found.is_best, best) and found.losses.dtype == torch.float32
    parts = features, *layer.parameters()
    for _ in range(2):  # a graph that is kept gives them again
        grads = gradients(reduce(found.losses), features, layer, retain_graph=True)
        assert [grad.dtype for grad in grads] == [part.dtype for part in parts]
        ours = errors((found.losses, *grads), exact)
        if autocast:
            usually = errors((usual, *gradients(reduce(usual), features, layer, retain_graph=True)), exact)
            assert all(error <= 1.25 * other for error, other in zip(ours, usually)), (ours, usually)
        else:
            assert max(ours) < 1e-6


def test_shapes_no_rows_and_parts_without_gradients():
    features, layer, targets = problem()
    found = predict(features[:36].view(4, 9, D), layer, targets[:36].view(4, 9), with_best=True)
    assert found.losses.shape == found.is_best.shape == (4, 9)
    assert torch.equal(found.losses.flatten(), predict(features[:36], layer, targets[:36]).losses)
    empty = predict(features[:0], layer, targets[:0], PAD, with_best=True)
    assert all(not grad.any() for grad in gradients(empty.losses.sum(), features, layer))
    layer.weight.requires_grad_(False)
    predict(features.detach(), layer, targets).losses.sum().backward()
    assert layer.weight.grad is None and layer.bias.grad.any()


@pytest.mark.parametrize("ignored", [None, PAD])
def test_differentiable_as_often_as_wanted(ignored):
    features, layer, targets = problem(dtype=torch.float64, N=11, D=2, V=5)

    def losses(features: Tensor, *parameters: Tensor) -> Tensor:
        return predict(features, layer, targets, ignored).losses

    inputs = features, *layer.parameters()
    assert torch.autograd.gradcheck(losses, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(losses, inputs)
    expected = gradients(losses(features).sum(), features, layer)[0]
    torch.testing.assert_close(torch.func.grad(lambda x: losses(x).sum())(features.detach()), expected)
    tangent = torch.ones_like(features)
    slope = torch.func.jvp(losses, (features.detach(),), (tangent,))[1].sum()
    torch.testing.assert_close(slope, (expected * tangent).sum())


def test_gradients_take_three_products_and_losses_one(rows_at_once):
    features, layer, targets = problem()
    chunks = -(-N // rows_at_once)
    with Operators() as training:
        predict(features, layer, targets, PAD).losses.sum().backward()
    assert training.products.total() == 3 * chunks
    with Operators() as evaluation, torch.no_grad():
        predict(features, layer, targets, PAD)
    assert evaluation.products.total() == chunks
    assert training.largest == evaluation.largest == max(V * D, -(-N // chunks) * V)


def test_fp16_gradients_wait_for_the_losses_scale():
    features, layer, targets = problem(bias=False)
    with torch.no_grad():
        layer.weight.copy_((2e-6 * layer.weight).half())
    expected = gradients(plain(features, layer, targets, None).sum(), features, layer)[0]
    with torch.autocast("cpu", torch.float16):
        losses = predict(features, layer, targets).losses
    scaled = gradients(losses.sum() * 2**12, features, layer)[0] / 2**12
    assert max(errors((scaled,), (expected.double(),))) < 2e-3
