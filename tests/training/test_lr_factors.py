"""Learning rates by the names of parameters against steps computed by hand, in a real training, and what is refused."""

import copy
from pathlib import Path

import pytest
import torch
from console import train
from decayed_models import adam_by_hand, build, factor, inputs, step
from trained_model import TrainedModel

from mhmoe_fairseq.checkpoints.files import read_checkpoint
from mhmoe_fairseq.training.optimizer import read_lr_factors

FLAGS = ("--lr-factors", "experts[.]fc2=0.25,^heads=2,fc2_weight=0.5")
BY_WIDTH = ("--lr-factors", "experts=3/fan_in")


def factor_by_name(name: str) -> float:
    """What ``FLAGS`` say, as cases."""
    if name.startswith("heads"):
        return 2.0
    if name.endswith("experts.fc2_weight"):
        return 0.125
    return 0.25 if name.endswith("experts.fc2_bias") else 1.0


def factor_by_width(name: str) -> float:
    """What ``BY_WIDTH`` says of experts 6 wide, for sub-tokens of 4 dimensions."""
    return {"experts.fc1_weight": 3 / 4, "experts.fc2_weight": 3 / 6}.get(name.partition("layers.1.")[2], 1.0)


@pytest.mark.parametrize(
    "flags, layers, factors",
    [
        (FLAGS, (1, 1), factor_by_name),
        (FLAGS, (0.5, 3.0), lambda name: factor_by_name(name) * factor(name)),
        (BY_WIDTH, (1, 1), factor_by_width),
    ],
    ids=["alone", "with --layer-decay", "by width"],
)
def test_steps_are_those_of_adam_by_hand(flags, layers, factors):
    model, optimizer = build(*layers, flags=flags)
    reference, batches = copy.deepcopy(model), [inputs(seed) for seed in range(3)]
    optimizer.set_lr(0.02)
    for x in batches:
        step(model, optimizer, x)
    assert optimizer.get_lr() == pytest.approx(0.02)
    for name, value in adam_by_hand(reference, batches, 0.02, factors).items():
        torch.testing.assert_close(dict(model.named_parameters())[name].double(), value, atol=2e-6, rtol=1e-4)


def test_a_training_steps_so_and_resumes_with_the_same_factors_only(trained_model: TrainedModel, tmp_path: Path):
    flags = ("--optimizer", "mhmoe_adam", "--disable-validation", "--lr-factors", "experts.fc2=0.5")
    train(trained_model.data, tmp_path, "mhmoe_lm_tiny", *flags, max_update=1)
    saved = read_checkpoint(tmp_path / "checkpoint_last.pt")
    groups = {group["lr_scale"]: group for group in saved["last_optimizer_state"]["param_groups"]}
    names = [name for name in saved["model"] if "experts.fc2" in name]
    assert names and len(groups[0.5]["params"]) == len(names)
    assert groups[0.5]["lr"] == pytest.approx(groups[1.0]["lr"] / 2)
    with pytest.raises(Exception, match="--lr-factors, .*: the run that is resumed had the factors"):
        train(trained_model.data, tmp_path, "mhmoe_lm_tiny", *flags[:-1], "experts.fc2=0.25", max_update=2)


@pytest.mark.parametrize(
    "text, message",
    [
        ("experts", r"--lr-factors \(experts\) must be PATTERN=FACTOR"),
        ("experts=fast", r"--lr-factors \(experts=fast\) must be PATTERN=FACTOR: could not convert"),
        ("experts(=2", r"--lr-factors \(experts\(=2\) must be PATTERN=FACTOR: missing \)"),
        ("=2", r"--lr-factors \(=2\) must name a pattern"),
        ("a=2,a=3", r"--lr-factors \(a=3\) must name another pattern"),
        ("a=0", r"--lr-factors \(a=0\) must have a positive, finite factor"),
        ("a=nan", r"--lr-factors \(a=nan\) must have a positive"),
        ("a=inf", r"--lr-factors \(a=inf\) must have a positive"),
        ("a=1/inputs", r"--lr-factors \(a=1/inputs\) must be PATTERN=FACTOR"),
        ("a=-1/fan_in", r"--lr-factors \(a=-1/fan_in\) must have a positive"),
        ("a=1,", r"--lr-factors \(\) must be PATTERN=FACTOR"),
    ],
)
def test_bad_factors(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        read_lr_factors(text)


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--lr-factors", "expert.fc2=2"), "--lr-factors: no parameter has expert.fc2 in its name; .*heads"),
        ((*FLAGS, "--fp16"), "--lr-factors: --fp16 needs --fp16-no-flatten-grads"),
        ((*FLAGS, "--zero-sharding", "os"), r"--lr-factors: --zero-sharding \(os\)"),
    ],
)
def test_what_cannot_be_done_is_refused(flags: tuple[str, ...], message: str):
    with pytest.raises(ValueError, match=message):
        build(1, 1, flags=flags)
