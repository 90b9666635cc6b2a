"""What layers change after each update: on one rank and two, uninterrupted and resumed, in half precision."""

import pytest
import torch
from parallel_runs import figures, saved, train, write_even_corpus

FIGURES = ("loss", "gnorm", "moe_load_max")
RATE = 0.01
BIAS = ("--mhmoe-gate-score", "sigmoid", "--mhmoe-balancing", "bias-sign", "--mhmoe-balancing-rate", RATE)


def assert_bias_after(bias, updates):
    """In each update a sign less the mean of signs."""
    unit = RATE / bias.size(-1)
    torch.testing.assert_close(bias, (bias / unit).round() * unit)
    assert 0.2 * RATE * updates < bias.abs().max() <= 2 * RATE * updates and bias.sum(-1).abs().max() < 1e-5


def assert_weight_after(weight, updates):
    """One for all layers, which grows while half of the experts are in use."""
    torch.testing.assert_close(weight, torch.full_like(weight, 1e-8 * 1.2**updates), rtol=1e-5, atol=0)


KINDS = {
    "bias": ((*BIAS, "--moe-gate-loss-wt", 0), "gate.balancing.bias", assert_bias_after, "moe_load_max"),
    "remoe": (
        ("--mhmoe-routing", "relu", "--moe-gate-loss-wt", 1, "--mhmoe-router", "linear"),
        "gate.adaptive.weight", assert_weight_after, "loss",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """An epoch that ends in an update of two batches and, on two ranks, one of a filler."""
    return write_even_corpus(tmp_path_factory.mktemp("corpus"), batches=27)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    recipe, *others = KINDS[request.param]
    return (*recipe, "--moe-freq", 1), *others


@pytest.fixture(scope="module")
def one(kind, data, tmp_path_factory):
    """What one rank logs, and its folder."""
    folder = tmp_path_factory.mktemp("one")
    return train(1, data, folder, *kind[0], "--save-interval-updates", 8, updates=16), folder


def states(folder, name):
    """Of both layers."""
    found = torch.stack([value for key, value in saved(folder)["model"].items() if key.endswith(name)])
    assert len(found) == 2 and found.dtype == torch.float32
    return found


def test_it_moves_by_every_update(one, kind):
    updates, folder = one
    _, name, assert_after, falls = kind
    assert_after(states(folder, name), 16)
    assert float(updates[-1][falls]) < float(updates[0][falls])


def test_two_ranks_and_an_interruption_change_nothing(one, kind, data, tmp_path):
    (updates, folder), (recipe, name, *_) = one, kind
    halves = train(2, data, tmp_path / "two", *recipe, updates=16)
    assert figures(halves, *FIGURES) == figures(updates, *FIGURES)
    assert torch.equal(states(tmp_path / "two", name), states(folder, name))
    (middle,) = folder.glob("checkpoint_*_8.pt")
    resumed = train(1, data, tmp_path / "resumed", *recipe, "--restore-file", middle, updates=16)
    assert figures(resumed, *FIGURES) == figures(updates[8:], *FIGURES)
    assert torch.equal(states(tmp_path / "resumed", name), states(folder, name))


def test_half_precision_keeps_it_in_full(kind, data, tmp_path):
    recipe, name, assert_after, _ = kind
    train(1, data, tmp_path, *recipe, "--memory-efficient-fp16", "--fp16-init-scale", 8, updates=6)
    assert_after(states(tmp_path, name), 6)
