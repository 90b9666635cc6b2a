"""Trainings without a balance loss: the bias of one rank and of two, uninterrupted and resumed, in half precision."""

import pytest
import torch
from parallel_runs import figures, saved, train, write_even_corpus

RECIPE = (
    "--mhmoe-gate-score", "sigmoid", "--mhmoe-balancing", "bias-sign", "--mhmoe-balancing-rate", 0.01,
    "--moe-gate-loss-wt", 0, "--moe-freq", 1,
)  # fmt: skip
FIGURES = ("loss", "gnorm", "moe_load_max")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """An epoch that ends in an update of two batches and, on two ranks, one of a filler."""
    return write_even_corpus(tmp_path_factory.mktemp("corpus"), batches=27)


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    """What one rank logs, and its folder."""
    folder = tmp_path_factory.mktemp("one")
    return train(1, data, folder, *RECIPE, "--save-interval-updates", 8, updates=16), folder


def biases(folder):
    found = {name: value for name, value in saved(folder)["model"].items() if name.endswith("gate.balancing.bias")}
    assert len(found) == 2 and all(value.dtype == torch.float32 for value in found.values())
    return torch.cat([*found.values()])


def test_the_bias_is_trained_and_balances(one):
    updates, folder = one
    bias = biases(folder)
    steps = (bias / 0.01 * bias.size(1)).round()  # a sign less the mean of signs, in each update
    torch.testing.assert_close(bias, steps * 0.01 / bias.size(1))
    assert bias.abs().max() > 0.03 and bias.sum(1).abs().max() < 1e-5
    assert float(updates[-1]["moe_load_max"]) < float(updates[0]["moe_load_max"])


def test_two_ranks_and_an_interruption_change_nothing(one, data, tmp_path):
    updates, folder = one
    halves = train(2, data, tmp_path / "two", *RECIPE, updates=16)
    assert figures(halves, *FIGURES) == figures(updates, *FIGURES)
    assert torch.equal(biases(tmp_path / "two"), biases(folder))
    (middle,) = folder.glob("checkpoint_*_8.pt")
    resumed = train(1, data, tmp_path / "resumed", *RECIPE, "--restore-file", middle, updates=16)
    assert figures(resumed, *FIGURES) == figures(updates[8:], *FIGURES)
    assert torch.equal(biases(tmp_path / "resumed"), biases(folder))


def test_half_precision_keeps_the_bias_in_full(data, tmp_path):
    train(1, data, tmp_path, *RECIPE, "--memory-efficient-fp16", "--fp16-init-scale", 8, updates=6)
    bias = biases(tmp_path)
    torch.testing.assert_close(bias, (bias / 0.01 * bias.size(1)).round() * 0.01 / bias.size(1))
    assert 0.02 < bias.abs().max() <= 6 * 0.02
