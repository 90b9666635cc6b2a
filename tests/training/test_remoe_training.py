"""ReMoE trained: the regulariser's weight of one rank and of two, uninterrupted and resumed, in half precision."""

import pytest
import torch
from parallel_runs import figures, saved, train, write_even_corpus

RECIPE = ("--mhmoe-routing", "relu", "--moe-gate-loss-wt", 1, "--moe-freq", 1, "--mhmoe-router", "linear")
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


def weights(folder):
    found = {name: value for name, value in saved(folder)["model"].items() if name.endswith("gate.adaptive.weight")}
    assert len(found) == 2 and all(value.dtype == torch.float32 for value in found.values())
    first, second = found.values()
    assert first == second  # one for the whole model
    return first


def test_the_weight_grows_while_half_of_the_experts_are_in_use(one):
    updates, folder = one
    torch.testing.assert_close(weights(folder), torch.tensor(1e-8 * 1.2**16))
    assert float(updates[-1]["loss"]) < float(updates[0]["loss"])


def test_two_ranks_and_an_interruption_change_nothing(one, data, tmp_path):
    updates, folder = one
    halves = train(2, data, tmp_path / "two", *RECIPE, updates=16)
    assert figures(halves, *FIGURES) == figures(updates, *FIGURES)
    assert torch.equal(weights(tmp_path / "two"), weights(folder))
    (middle,) = folder.glob("checkpoint_*_8.pt")
    resumed = train(1, data, tmp_path / "resumed", *RECIPE, "--restore-file", middle, updates=16)
    assert figures(resumed, *FIGURES) == figures(updates[8:], *FIGURES)
    assert torch.equal(weights(tmp_path / "resumed"), weights(folder))


def test_half_precision_keeps_the_weight_in_full(data, tmp_path):
    train(1, data, tmp_path, *RECIPE, "--memory-efficient-fp16", "--fp16-init-scale", 8, updates=4)
    torch.testing.assert_close(weights(tmp_path), torch.tensor(1e-8 * 1.2**4))
