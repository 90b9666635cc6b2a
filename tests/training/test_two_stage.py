"""BitNet's schedule: rates and decays by hand, and a run that stops in either half goes on as one that did not."""

import shutil
from pathlib import Path

import pytest
import torch
from console import train
from fairseq import optim
from parallel_runs import configuration
from trained_model import TrainedModel

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.training.two_stage import TwoStageConfig, TwoStageSchedule

FLAGS = ["--lr-scheduler", "mhmoe_two_stage", "--weight-decay", "0.1", "--warmup-updates", "2", "--lr", "0.01"]


def optimizer(*flags: str) -> optim.FairseqOptimizer:
    parameters = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
    config = configuration(*flags)
    if "--fp16" in flags:
        return optim.FP16Optimizer.build_optimizer(config, [parameter.half() for parameter in parameters])
    return optim.build_optimizer(config.optimizer, parameters)


def schedule(of: optim.FairseqOptimizer, **fields: object) -> TwoStageSchedule:
    return TwoStageSchedule(TwoStageConfig(**{"max_update": 100, "lr": [0.0015], "warmup_updates": 10, **fields}), of)


def test_rates_and_decays_by_hand():
    adam = optimizer("--weight-decay", "0.1")
    found = schedule(adam, second_lr=0.001)
    for updates, lr, decay in (
        (0, 0, 0.1), (5, 0.0015 * 0.95 / 2, 0.1), (10, 0.0015 * 0.9, 0.1), (49, 0.0015 * 0.51, 0.1),
        (50, 0.001 * 0.5, 0), (99, 0.001 * 0.01, 0), (100, 0, 0), (101, 0, 0), (20, 0.0015 * 0.8, 0.1),
    ):  # fmt: skip
        assert found.step_update(updates) == pytest.approx(lr) == adam.get_lr()
        assert [group["weight_decay"] for group in adam.param_groups] == [decay] * len(adam.param_groups)
        assert adam.get_lr() == adam.param_groups[0]["lr"]


def test_the_second_rate_is_two_thirds_of_the_first_unless_given():
    assert schedule(optimizer()).step_update(75) == pytest.approx(0.001 * 0.25)
    assert schedule(optimizer(), second_lr=0.0).step_update(75) == 0
    assert schedule(optimizer(), warmup_updates=0).step_update(0) == 0.0015


def test_decay_of_the_second_half_and_below_a_wrapper():
    wrapped = optimizer("--fp16", "--fp16-no-flatten-grads", "--weight-decay", "0.1")
    found = schedule(wrapped, second_weight_decay=0.02)
    for updates, decay in ((49, 0.1), (50, 0.02)):
        found.step_update(updates)
        assert {group["weight_decay"] for group in wrapped.fp32_optimizer.param_groups} == {decay}


@pytest.mark.parametrize(
    "fields, message",
    [({"max_update": 0}, r"--max-update \(0\) must be given"), ({"lr": [0.1, 0.2]}, r"--lr \(0.1, 0.2\) must be one")],
)
def test_what_it_needs(fields: dict, message: str):
    with pytest.raises(UserError, match=message):
        schedule(optimizer(), **fields)


def test_a_run_that_stops_in_the_second_half_goes_on_as_one_that_did_not(trained_model: TrainedModel, tmp_path: Path):
    flags = [*FLAGS, "--second-weight-decay", "0.3", "--optimizer", "mhmoe_adam", "--mhmoe-quantize", "all"]
    folder, states = tmp_path / "run", []
    for _ in range(2):
        train(trained_model.data, folder, "mhmoe_lm_tiny", *flags, "--save-interval-updates", 5, max_update=8)
        states.append(torch.load(folder / "checkpoint_last.pt", weights_only=True))
        shutil.copy(next(folder.glob("checkpoint_*_5.pt")), folder / "checkpoint_last.pt")  # to go on from
    one, other = (state["model"] for state in states)
    assert all(torch.equal(one[key], other[key]) for key in one)
    groups = [state["last_optimizer_state"]["param_groups"][0] for state in states]
    assert groups[0]["weight_decay"] == groups[1]["weight_decay"] == 0.3
