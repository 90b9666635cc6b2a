"""The norm without the running mean, by hand."""

import pytest
import torch
import torch.nn.functional as F

from mhmoe_fairseq.models.heads import CenteredLayerNorm

WIDTH = 5


@pytest.fixture
def norm():
    layer = CenteredLayerNorm(WIDTH)
    torch.manual_seed(3)
    for parameter in layer.parameters():
        parameter.data = torch.randn(WIDTH)
    return layer


def batches(number, rows=4):
    return torch.randn(number, rows, WIDTH, generator=torch.Generator().manual_seed(1)) + 10


def test_the_mean_is_of_all_rows_and_then_of_the_last_batches(norm):
    seen = batches(60)
    for x in seen[:20]:
        norm(x)
    torch.testing.assert_close(norm.running_mean, seen[:20].mean((0, 1)))
    for x in seen[20:]:
        norm(x)
    expected = seen[:50].mean((0, 1))
    for x in seen[50:]:
        expected = 0.98 * expected + 0.02 * x.mean(0)
    torch.testing.assert_close(norm.running_mean, expected)
    assert norm.num_batches.item() == 60


def test_output_and_gradients_are_a_layer_norms_of_the_differences(norm):
    first, x = batches(2)
    norm(first)
    x.requires_grad_()
    out = norm(x)
    rows = x.detach().clone().requires_grad_()
    weight, bias = (parameter.detach().clone().requires_grad_() for parameter in (norm.weight, norm.bias))
    mean = (first.mean(0) + rows.detach().mean(0)) / 2  # a constant: no gradient goes through it
    expected = F.layer_norm(rows - mean, (WIDTH,), weight, bias)
    torch.testing.assert_close(out, expected)
    for y in (out, expected):
        y.pow(3).sum().backward()
    for ours, theirs in ((x, rows), (norm.weight, weight), (norm.bias, bias)):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_evaluation_leaves_the_mean_and_looks_at_rows_one_by_one(norm):
    first, x = batches(2)
    norm(first)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    norm.eval()
    whole = norm(x)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    torch.testing.assert_close(torch.cat([norm(row[None]) for row in x]), whole)
    again = CenteredLayerNorm(WIDTH).eval()
    again.load_state_dict(before)
    assert torch.equal(again(x), whole)


def test_what_all_rows_have_in_common_does_not_show():
    x = batches(1)[0]
    torch.testing.assert_close(CenteredLayerNorm(WIDTH)(x + 100), CenteredLayerNorm(WIDTH)(x), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    norm = CenteredLayerNorm(WIDTH).to(dtype)
    for x in batches(3).to(dtype):
        out = norm(x)
    assert out.dtype == norm.running_mean.dtype == dtype and norm.num_batches.dtype == torch.long
    torch.testing.assert_close(norm.running_mean.double(), batches(3).double().mean((0, 1)), atol=0.1, rtol=0.01)
