"""Fine-tuning through fairseq-train: exact resume, several ranks, all families."""

import json
import re

import pytest
import torch
from console import evaluation_record, run_console
from labelled import training_words, write_task
from language_models import FAMILIES


@pytest.fixture(scope="module")
def data(trained_model, tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("labelled"), trained_model, held_out=16)


def train(data, save_dir, *flags, updates):
    return run_console("fairseq-train", *training_words(data, save_dir, *flags, updates=updates), cwd=data)


def state(save_dir):
    return torch.load(save_dir / "checkpoint_last.pt", weights_only=True)


def losses(log):
    """The loss and gradient norm of every update."""
    updates = [json.loads(line) for line in re.findall(r"train_inner[ |:]+(\{.*\})", log)]
    return [(update["num_updates"], float(update["loss"]), float(update["gnorm"])) for update in updates]


def assert_equal_states(one, two):
    assert one["model"].keys() == two["model"].keys()
    assert all(torch.equal(one["model"][name], two["model"][name]) for name in one["model"])
    for moments, others in zip(
        one["last_optimizer_state"]["state"].values(), two["last_optimizer_state"]["state"].values()
    ):
        assert all(torch.equal(moments[key], others[key]) for key in ("exp_avg", "exp_avg_sq"))


def test_resuming_in_the_middle_of_an_epoch_is_exact(data, trained_model, tmp_path):
    """With dropout in the model and the head; the language model is read at the first start only."""
    pretrained = tmp_path / "lm.pt"
    pretrained.write_bytes(trained_model.checkpoint.read_bytes())
    flags = ("--finetune-from-model", pretrained, "--mhmoe-head-dropout", 0.2, "--dropout", 0.1, "--disable-validation")
    whole = train(data, tmp_path / "whole", *flags, updates=12)
    first = train(data, tmp_path / "parts", *flags, updates=5)
    pretrained.unlink()
    second = train(data, tmp_path / "parts", *flags, updates=12)
    assert losses(first) + losses(second) == losses(whole) and len(losses(whole)) == 12
    assert_equal_states(state(tmp_path / "parts"), state(tmp_path / "whole"))


def test_two_ranks_that_share_the_experts_do_what_one_does(data, trained_model, tmp_path, workers2, capsys):
    flags = (
        "--finetune-from-model", trained_model.checkpoint, "--dropout", 0, "--mhmoe-head-dropout", 0,
        "--disable-validation",
    )  # fmt: skip
    one = train(data, tmp_path / "one", *flags, "--update-freq", 2, updates=5)
    two = workers2.fairseq("fairseq-train", *training_words(data, tmp_path / "two", *flags, updates=5))[0]
    assert "2 of 2 processes share the experts of a layer" in two
    assert len(losses(one)) == 5
    for (number, loss, norm), (same, other_loss, other_norm) in zip(losses(one), losses(two)):
        assert number == same and other_loss == pytest.approx(loss, abs=2e-3)
        assert other_norm == pytest.approx(norm, rel=1e-2)
    weights = (state(tmp_path / name)["model"] for name in ("one", "two"))
    for name, tensor in next(weights).items():
        if not name.endswith("k_proj.bias"):  # its gradient is rounding alone
            torch.testing.assert_close(state(tmp_path / "two")["model"][name], tensor, atol=2e-3, rtol=0)
    assert evaluation_record(tmp_path, tmp_path / "two", "--split", "valid_en").main.count == 16


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_from_scratch(data, tmp_path, family, capsys):
    flags = ("--arch", f"{family}_lm_tiny", "--moe-gate-loss-wt", 0.01)
    train(data, tmp_path / family, *flags, updates=80)
    accuracy = evaluation_record(tmp_path, tmp_path / family, "--split", "valid_fr").metrics["accuracy"]
    assert accuracy.value > accuracy.baselines["majority"]
