"""Learning rates by layer against steps computed by hand, the same in all precisions, and what is refused."""

import copy

import pytest
import torch
from decayed_models import FACTORS, HEAD, LR, adam_by_hand, build, factor, inputs, settings, step
from fairseq.optim.lr_scheduler import build_lr_scheduler

from mhmoe_fairseq.training.optimizer import layer_scale


def test_steps_are_those_of_adam_by_hand():
    model, optimizer = build()
    reference, batches = copy.deepcopy(model), [inputs(seed) for seed in range(3)]
    optimizer.set_lr(0.02)  # what a scheduler does
    for x in batches:
        step(model, optimizer, x)
    for name, value in adam_by_hand(reference, batches, 0.02, factor).items():
        torch.testing.assert_close(dict(model.named_parameters())[name].double(), value, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("beit3.text_embed.weight", 0.5**3),
        ("beit3.vision_embed.cls_token", 0.5**3),
        ("beit3.vision_embed.proj.bias", 0.5**3),
        ("beit3.encoder.embed_positions.A.weight", 0.5**3),
        ("beit3.encoder.layers.0.self_attn.q_proj.A.weight", 0.5**2),
        ("beit3.encoder.layers.1.moe_layer.router.expert_embedding", 0.5),
        ("beit3.encoder.layer_norm.B.weight", 1),
        ("heads.vqa.pooler.weight", 3),
    ],
)
def test_factors_of_a_models_parameters(name, expected):
    """An X-MoE router's expert embeddings belong to their layer, and not to the embeddings as in unilm."""
    assert layer_scale(name, 2, 0.5, 3.0) == expected


@pytest.mark.parametrize(
    "flags",
    [(), ("--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", 4), ("--fp16", "--memory-efficient-fp16")],
    ids=["fp32", "fp16", "memory-efficient"],
)
def test_a_schedule_sets_every_groups_learning_rate(flags):
    _, optimizer = build(flags=flags)
    scheduler = build_lr_scheduler(
        settings("--lr-scheduler", "inverse_sqrt", "--warmup-updates", 10).lr_scheduler, optimizer
    )
    assert scheduler.step_update(5) == pytest.approx(LR / 2) and optimizer.get_lr() == pytest.approx(LR / 2)
    rates = sorted(group["lr"] for group in optimizer.param_groups)
    assert rates == pytest.approx(sorted(LR / 2 * value for value in FACTORS.values()))


def test_without_decay_there_is_one_group_as_in_fairseq():
    _, optimizer = build(decay=1, head=1)
    [group] = optimizer.param_groups
    assert "lr_scale" not in group and group["lr"] == LR


def test_a_saved_state_goes_on():
    model, optimizer = build()
    step(model, optimizer, inputs(0))
    other, its = build()
    other.load_state_dict(model.state_dict())
    its.load_state_dict(copy.deepcopy(optimizer.state_dict()), {"lr": 0.3})
    assert its.get_lr() == pytest.approx(0.3)
    its.set_lr(LR)
    for each in ((model, optimizer), (other, its)):
        step(*each, inputs(1))
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters()))


@pytest.mark.parametrize("decay, head", [(0.7, HEAD), (1.0, 1.0)])
def test_a_state_of_other_factors_is_refused(decay, head):
    _, optimizer = build()
    with pytest.raises(ValueError, match="--lr-factors, --layer-decay, .* had the factors 0.125, 0.25, 0.5"):
        build(decay, head)[1].load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    "decay, head, flags, message",
    [
        (0.5, 1, ("--optimizer", "adam"), r"--layer-decay: --optimizer \(adam\) must be mhmoe_adam"),
        (1, 2, ("--optimizer", "adam"), r"--head-lr-multiplier: --optimizer \(adam\) must be mhmoe_adam"),
        (0.5, 1, ("--fp16",), "--fp16 needs --fp16-no-flatten-grads"),
        (0.5, 1, ("--zero-sharding", "os"), r"--zero-sharding \(os\)"),
        (0.5, 1, ("--ddp-backend", "fully_sharded"), "fully_sharded"),
    ],
)
def test_what_cannot_be_done_is_refused(decay, head, flags, message):
    with pytest.raises(ValueError, match=message):
        build(decay, head, flags=flags)
