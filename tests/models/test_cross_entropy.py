"""Losses in chunks of rows against the plain way in float64: values, gradients, memory and number of products.

By the compiled kernel and without it.
"""

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mhmoe_fairseq.models import cross_entropy
from mhmoe_fairseq.models.cross_entropy import predict
from mhmoe_fairseq.moe.cpu import kernels

N, D, V, PAD = 37, 8, 50, 1
NAN, INF = float("nan"), float("inf")
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


@pytest.fixture(autouse=True, params=["kernel", "operations"])
def way(request, monkeypatch):
    if request.param == "operations":
        monkeypatch.setattr(cross_entropy, "_has_kernel", lambda x: False)
    elif not kernels.load():
        pytest.skip("the kernels are not built")
    return request.param


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


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
    with torch.no_grad():
        layer.weight[:2] *= 3  # often best: padding, and what stands for it
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
        best = layer(features).argmax(-1).eq(targets) & targets.ne(-100 if ignored is None else ignored)
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


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "largest", [{3: 10.0}, {3: -80.0}, {3: 2.0, 5: 2.0}, {1: 2.0, 3: 2.0}, {5: NAN}, {3: NAN}, {5: INF}, {5: -INF}]
)
@pytest.mark.parametrize("size", [64, 50])  # whole vectors, and not
def test_rows_at_their_extremes(largest, autocast, size):
    row, target = torch.zeros(size, dtype=torch.float64), torch.tensor([3])
    row[[*largest]] = torch.tensor([*largest.values()], dtype=torch.float64)
    loss = F.cross_entropy(row.requires_grad_(), target[0])
    loss.backward()
    layer = nn.Linear(D, size)
    with torch.no_grad():
        layer.bias.copy_(row)  # of features of zeros the logits
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = predict(torch.zeros(1, D), layer, target, with_best=True)
    found.losses.sum().backward()
    close = partial(torch.testing.assert_close, equal_nan=True, check_dtype=False, atol=0)
    close(found.losses[0], loss, rtol=1e-4)
    close(layer.bias.grad, row.grad, rtol=2**-8 if autocast else 1e-4)
    assert loss.isnan() or found.is_best.item() == (row.argmax().item() == 3)


def test_targets_need_not_lie_side_by_side_and_must_be_symbols():
    features, layer, targets = problem()
    spread = torch.stack([targets, torch.zeros_like(targets)], 1)[:, 0]
    assert torch.equal(predict(features, layer, spread).losses, predict(features, layer, targets).losses)
    for wrong in (V, -1):
        with pytest.raises((IndexError, RuntimeError), match="target|out of bounds"):
            predict(features, layer, torch.full_like(targets, wrong))


def test_many_rows_on_two_threads(two_threads):
    features, layer, targets = problem(N=1500)
    found, wanted = predict(features, layer, targets).losses, plain(features, layer, targets, None)
    torch.testing.assert_close(found, wanted)
    pairs = zip(*(gradients(losses.sum(), features, layer) for losses in (found, wanted)))
    assert max(float((one - other).abs().max()) for one, other in pairs) < 1e-3


def test_fp16_gradients_wait_for_the_losses_scale():
    features, layer, targets = problem(bias=False)
    with torch.no_grad():
        layer.weight.copy_((2e-6 * layer.weight).half())
    expected = gradients(plain(features, layer, targets, None).sum(), features, layer)[0]
    with torch.autocast("cpu", torch.float16):
        losses = predict(features, layer, targets).losses
    scaled = gradients(losses.sum() * 2**12, features, layer)[0] / 2**12
    assert max(errors((scaled,), (expected.double(),))) < 2e-3
