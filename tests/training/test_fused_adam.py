"""The fused Adam against fairseq's own: weights, states, resumed runs, clipping, and what the kernel cannot take."""

import copy
import functools
import logging
from argparse import Namespace

import pytest
import torch
from fairseq import optim
from fairseq.optim.adam import Adam
from fairseq.tasks import FairseqTask
from parallel_runs import configuration
from torch import nn

from mhmoe_fairseq.training import ParallelTask
from mhmoe_fairseq.training.fused_adam import FusedAdam
from mhmoe_fairseq.training.layer_updates import LayerUpdates

SHAPES = (7, 5), (3,), (), (0, 4), (100, 33)
HALVES = (torch.float16, torch.bfloat16)


class Task(ParallelTask, FairseqTask):
    """A task of this package with nothing of its own."""


WRAPPERS = {
    "fp32": [],
    "fp16-no-flatten": ["--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", "4"],
    "fp16-memory-efficient": ["--fp16", "--memory-efficient-fp16", "--fp16-init-scale", "4"],
    "bf16": ["--bf16"],
    "amp": ["--amp"],
}


settings = functools.cache(configuration)  # fairseq takes long to make them


def parameters(dtype=torch.float32):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]


def adam(cls, dtype=torch.float32, eps=1e-8, weight_decay=0.1):
    return cls(parameters(dtype), lr=1e-2, betas=(0.9, 0.98), eps=eps, weight_decay=weight_decay)


def members(optimizer):
    return optimizer.param_groups[0]["params"]


def updates(optimizer, numbers):
    """Gradients of very different scales; of every third parameter and update there is none."""
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        for index, parameter in enumerate(members(optimizer)):
            scales = 10.0 ** torch.empty(parameter.shape).uniform_(-6, 1, generator=generator)
            gradient = torch.randn(parameter.shape, generator=generator) * scales
            parameter.grad = gradient.to(parameter.dtype) if (number + index) % 3 else None
        optimizer.step()
    return optimizer


def assert_close(actual, expected, rel=1e-6):
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    if expected.numel():
        assert float((actual - expected).abs().max()) <= rel * float(expected.abs().max())


def assert_like_fairseqs(fused, stock):
    for own, its in zip(members(fused), members(stock)):
        # In half precision a value between two numbers may be rounded to either.
        assert_close(own, its, rel={torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(own.dtype, 1e-6))
        state, expected = fused.state[own], stock.state[its]
        assert list(state) == list(expected) == ["step", "exp_avg", "exp_avg_sq"]
        assert type(state["step"]) is int and state["step"] == expected["step"]
        for key in ("exp_avg", "exp_avg_sq"):
            assert_close(state[key], expected[key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("eps, weight_decay", [(1e-8, 0.1), (1e-3, 0.0)])
def test_fifty_updates_are_fairseqs(dtype, eps, weight_decay):
    fused, stock = (updates(adam(cls, dtype, eps, weight_decay), range(50)) for cls in (FusedAdam, Adam))
    assert_like_fairseqs(fused, stock)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("before, after", [(Adam, FusedAdam), (FusedAdam, Adam)])
def test_each_goes_on_from_the_others_state(before, after, dtype):
    first, second = updates(adam(before, dtype), range(7)), adam(after, dtype)
    for old, new in zip(members(first), members(second)):
        new.data.copy_(old.data)
    state = copy.deepcopy(first.state_dict())
    second.load_state_dict(state)
    assert state["param_groups"] == second.state_dict()["param_groups"]
    for old, new in zip(members(first), members(second)):  # what MemoryEfficientFP16Optimizer does after a load
        second.state[new] = copy.deepcopy(first.state[old])
    fused, stock = (first, second) if before is FusedAdam else (second, first)
    updates(fused, range(7, 14))
    updates(stock, range(7, 14))
    assert_like_fairseqs(fused, stock)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("max_norm", [0, 0.5])
def test_multiplied_and_clipped_in_every_wrapper(wrapper, max_norm):
    """Also after a step that was left out, whose factors must be forgotten."""
    outcomes = []
    for flags in ([], ["--use-old-adam"]):
        config = settings(*WRAPPERS[wrapper], *flags)
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        if config.common.fp16 or config.common.bf16:
            model.to(torch.bfloat16 if config.common.bf16 else torch.float16)
        optimizer = build(config, list(model.parameters()))
        norms = []
        for number in range(6):
            optimizer.zero_grad()
            x = torch.randn(9, 6, generator=torch.Generator().manual_seed(number)).to(model[0].weight.dtype)
            optimizer.backward(9 * model(x).float().square().sum())
            optimizer.multiply_grads(torch.tensor(1 / 9) if number % 2 else 1 / 9)
            norms.append(float(optimizer.clip_grad_norm(max_norm)))
            if number != 3:
                optimizer.step()
        outcomes.append(
            (type(optimizer.optimizer), norms, [parameter.detach().float() for parameter in model.parameters()])
        )
    (fused, norms, weights), (stock, expected_norms, expected) = outcomes
    assert (fused, stock) == (FusedAdam, Adam)
    half = {"fp16-no-flatten": 1e-3, "fp16-memory-efficient": 1e-3, "bf16": 8e-3}.get(wrapper)
    assert norms == pytest.approx(expected_norms, rel=half or 1e-6)
    for own, its in zip(weights, expected):
        assert_close(own, its, rel=half or 1e-6)


def build(config, members):
    if config.common.amp:
        return optim.AMPOptimizer.build_optimizer(config, members)
    if not (config.common.fp16 or config.common.bf16):
        return optim.build_optimizer(config.optimizer, members)
    wrapper = optim.MemoryEfficientFP16Optimizer if config.common.memory_efficient_fp16 else optim.FP16Optimizer
    return wrapper.build_optimizer(config, members)


@pytest.mark.parametrize("old", [[], ["--use-old-adam"]])
def test_amp_takes_the_step_of_fp32_also_where_gradients_are_near_epsilon(old):
    """And not that of a gradient divided by the loss scale twice, as fairseq's alone would."""
    taken = []
    for amp in ([], ["--amp"]):
        members, scale = parameters(), 1.0
        optimizer = build(settings(*amp, *old), members)
        if amp:
            optimizer._grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15)
            scale = float(optimizer.scaler.scale(torch.ones(())))
        for index, parameter in enumerate(members):
            parameter.grad = torch.full_like(parameter, 1e-7 * (index + 1) * scale)
        norm = float(optimizer.clip_grad_norm(0.0))
        task = Task(Namespace())
        task._layer_updates = LayerUpdates(nn.Linear(1, 1))
        task.optimizer_step(optimizer, None, 1)
        moments = [optimizer.optimizer.state[parameter]["exp_avg"] for parameter in members]
        taken.append((norm, [*members, *moments]))
    (norm, fp32), (its_norm, mixed) = taken
    assert its_norm == pytest.approx(norm)
    for own, its in zip(mixed, fp32):
        assert_close(own.detach(), its.detach(), 1e-5)


def test_gradients_are_multiplied_in_the_step_alone():
    optimizer = build(settings(), parameters())
    for parameter in optimizer.params:
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.multiply_grads(0.5)
    optimizer.clip_grad_norm(1e-3)
    assert all(bool((parameter.grad == 3.0).all()) for parameter in optimizer.params)
    optimizer.optimizer.zero_grad()
    for parameter in optimizer.params:
        parameter.grad = torch.full_like(parameter, 3.0)
    assert float(optimizer.clip_grad_norm(0)) == pytest.approx(3 * sum(p.numel() for p in optimizer.params) ** 0.5)


def test_another_inner_optimizer_multiplies_at_once():
    """As with --zero-sharding, which puts its own there."""
    optimizer = build(settings(), parameters())
    optimizer.optimizer = torch.optim.SGD(list(optimizer.params), lr=0.1)
    for parameter in optimizer.params:
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.multiply_grads(0.5)
    assert all(bool((parameter.grad == 1.5).all()) for parameter in optimizer.params)


def strided(parameter):
    parameter.data = parameter.data.t().contiguous().t()


def strided_gradient(parameter):
    parameter.grad = parameter.grad.t().contiguous().t()


def complex_numbers(parameter):
    parameter.data, gradient = parameter.data.cfloat(), parameter.grad.cfloat()
    parameter.grad = gradient


@pytest.mark.parametrize("change", [strided, strided_gradient, complex_numbers, "amsgrad"])
def test_what_the_kernel_cannot_take_is_left_to_fairseq(change, caplog):
    caplog.set_level(logging.DEBUG, "mhmoe_fairseq")
    outcomes = []
    for cls in (FusedAdam, Adam):
        optimizer = adam(cls)
        if change == "amsgrad":
            optimizer.param_groups[0]["amsgrad"] = True
        for number in range(3):
            for parameter in members(optimizer):
                generator = torch.Generator().manual_seed(number)
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if callable(change):
                change(members(optimizer)[0])
            optimizer.factor = 0.25**number  # one for all updates would change nothing
            if cls is Adam:
                for parameter in members(optimizer):
                    parameter.grad.mul_(0.25**number)
            optimizer.step()
        outcomes.append(optimizer)
    fused, stock = outcomes
    for own, its in zip(members(fused), members(stock)):
        assert_close(own, its)
        assert fused.state[own].keys() == stock.state[its].keys() and fused.state[own]["step"] == 3
    (message,) = [record for record in caplog.records if record.levelno == logging.DEBUG]
    count = len(SHAPES) if change == "amsgrad" else 1
    assert f"{count} parameters take fairseq's own Adam step" in message.getMessage()


def test_sparse_gradients_are_refused_before_anything_is_updated():
    optimizer = adam(FusedAdam)
    before = copy.deepcopy(members(optimizer))
    for parameter in members(optimizer):
        parameter.grad = torch.ones_like(parameter)
    members(optimizer)[4].grad = torch.ones(100, 33).to_sparse()
    assert not optimizer.multiplies_gradients()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert all(map(torch.equal, members(optimizer), before)) and len(members(optimizer)) == len(SHAPES)


def test_a_closure_is_computed_with_gradients():
    optimizer = adam(FusedAdam)

    def closure():
        loss = sum(parameter.square().sum() for parameter in members(optimizer))
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad and optimizer.state[members(optimizer)[0]]["step"] == 1


def test_it_supports_what_fairseqs_adam_supports():
    inner = build(settings(), parameters())
    assert inner.supports_memory_efficient_fp16 and inner.supports_flat_params
