"""The optimizer of experts that are shared out: whole states in, whole states out, one gradient norm."""

import copy

import pytest
import torch
import torch.distributed as dist
from fairseq import optim
from fairseq.optim import OPTIMIZER_REGISTRY
from parallel_runs import configuration
from torch import nn

from mhmoe_fairseq.moe import MHMoEConfig, MHMoELayer
from mhmoe_fairseq.parallel import expert_parallelism
from mhmoe_fairseq.training import MHMoEAdam, prepare_sharded_model

LAYER = MHMoEConfig(
    embed_dim=8, num_heads=2, num_experts=4, top_k=2, expert_ffn_dim=6, expert_layernorm=True, activation="swiglu"
)
PRECISIONS = {
    "fp32": [],
    "fp16-no-flatten": ["--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", "4"],
    "fp16-memory-efficient": ["--fp16", "--memory-efficient-fp16", "--fp16-init-scale", "4"],
    "amp": ["--amp"],
}
BAD = (float("inf"), float("nan"))


class Model(nn.Module):
    def __init__(self, parallel=None):
        super().__init__()
        torch.manual_seed(3)
        self.dense = nn.Linear(8, 8)
        self.layer = MHMoELayer(LAYER, parallel=parallel)
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1

    def forward(self, x):
        output = self.layer(self.dense(x))
        return output.hidden.float().square().sum() + output.balance_loss

    def all_reduce_grads(self):
        """What fairseq's legacy_ddp does: an average, without what is marked as an expert."""
        for parameter in self.parameters():
            if not hasattr(parameter, "expert"):
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.world_size


def build(config, parallel=None):
    """The model and its optimizer, as fairseq's trainer builds them."""
    common = config.common
    model = Model(parallel)
    prepare_sharded_model(model, config.task)
    if common.fp16:
        model.half()
    parameters = list(model.parameters())
    if common.amp:
        return model, optim.AMPOptimizer.build_optimizer(config, parameters)
    if not common.fp16:
        return model, optim.build_optimizer(config.optimizer, parameters)
    wrapper = optim.MemoryEfficientFP16Optimizer if common.memory_efficient_fp16 else optim.FP16Optimizer
    return model, wrapper.build_optimizer(config, parameters)


def inputs(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 8, generator=generator).to(model.dense.weight.dtype)


def one_process_states(config):
    """Model and optimizer after three updates with all experts in one process."""
    model, optimizer = build(config)
    model.all_reduce_grads = lambda: None
    for seed in range(3):
        update(model, optimizer, inputs(model, seed))
    return copy.deepcopy((dict(model.state_dict()), optimizer.state_dict()))


def update(model, optimizer, x):
    optimizer.zero_grad()
    optimizer.backward(model(x))
    optimizer.all_reduce_grads(model)
    norm = optimizer.clip_grad_norm(1.0)
    optimizer.step()
    return norm


def round_trip(config, size, states):
    """Load the states of one process, then save: what rank 0 gets."""
    model, optimizer = build(config, expert_parallelism(size))
    model.load_state_dict(states[0])
    optimizer.load_state_dict(copy.deepcopy(states[1]))  # it is cut to this rank's part in place
    assert model.layer.experts.fc1_weight.size(0) == 4 // size
    for parameter, state in optimizer.optimizer.state.items():
        for value in filter(torch.is_tensor, state.values()):
            assert value.shape in (parameter.shape, ())  # this rank's part
            assert value.untyped_storage().nbytes() == value.nbytes  # the tensors over all experts are let go
    optimizer.optimizer.consolidate_state_dict()
    if dist.get_rank() > 0:
        return None
    return dict(model.state_dict()), optimizer.state_dict()


def assert_same(one, other, path="state"):
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif torch.is_tensor(one):
        assert one.dtype == other.dtype and torch.equal(one, other), path
    else:
        assert one == other, path


def norms(config, size):
    model, optimizer = build(config, expert_parallelism(size) if size > 1 else None)
    x = inputs(model).repeat(2, 1)  # every rank the same, so that the mean over ranks is one rank's
    return [float(update(model, optimizer, x)) for _ in range(3)]


def norm_with_one_bad_expert(config, bad):
    model, optimizer = build(config, expert_parallelism(4))
    optimizer.backward(model(inputs(model)))
    optimizer.all_reduce_grads(model)
    if dist.get_rank() == 2:
        model.layer.experts.fc2_weight.grad[0, 0, 0] = bad
    norm = optimizer.clip_grad_norm(1.0)
    own = torch.stack([parameter.grad.square().sum() for parameter in model.layer.experts.parameters()])
    return float(norm), bool(torch.isfinite(own).all())


def save_without_gathering(config):
    """The errors of the model and of the optimizer; after a gather both save once."""
    model, optimizer = build(config, expert_parallelism(2))
    update(model, optimizer, inputs(model))
    errors = [error_of(model.state_dict), error_of(optimizer.state_dict)]
    optimizer.optimizer.consolidate_state_dict()
    if dist.get_rank() == 0:
        for state_dict in (model.state_dict, optimizer.state_dict):
            state_dict()
            errors.append(error_of(state_dict))  # what was gathered is of that moment only
    return errors


def save_while_failing(config):
    """As fairseq's trainer does after an exception in a training step, on the rank that had it: rank 1 alone."""
    _, optimizer = build(config, expert_parallelism(2))
    if dist.get_rank() == 1:
        try:
            raise ValueError("this rank's own trouble")
        except ValueError:
            return error_of(optimizer.optimizer.consolidate_state_dict)


def prepare_with_fp16_statistics(config):
    return error_of(lambda: prepare_sharded_model(Model(expert_parallelism(2)), config.task))


def error_of(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def everything(configs, states):
    """On each of four ranks; in one call, because a process spends far more time on its imports."""
    plain = configs["fp32"]
    return {
        "round trips": {(p, size): round_trip(configs[p], size, states[p]) for p in PRECISIONS for size in (2, 4)},
        "norms": {(p, size): norms(configs[p], size) for p in PRECISIONS for size in (1, 2, 4)},
        "bad gradients": [norm_with_one_bad_expert(plain, bad) for bad in BAD],
        "not gathered": save_without_gathering(plain),
        "failing": save_while_failing(plain),
        "fp16 statistics": prepare_with_fp16_statistics(configs["fp16 statistics"]),
    }


@pytest.fixture(scope="module")
def configs():
    flags = {**PRECISIONS, "fp16 statistics": ["--fp16-adam-stats"]}
    return {name: configuration(*words) for name, words in flags.items()}


@pytest.fixture(scope="module")
def states(configs):
    return {precision: one_process_states(configs[precision]) for precision in PRECISIONS}


@pytest.fixture(scope="module")
def outcomes(workers4, configs, states):
    return workers4.run(everything, configs, states)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", [2, 4])
def test_a_state_comes_back_bit_for_bit(outcomes, states, precision, size):
    assert states[precision][1]["state"], "an update was skipped"
    for outcome, expected in zip(outcomes[0]["round trips"][precision, size], states[precision]):
        assert_same(outcome, expected)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_gradient_norm_for_any_number_of_ranks(outcomes, precision):
    of_ranks = [outcome["norms"] for outcome in outcomes]
    assert of_ranks.count(of_ranks[0]) == 4
    expected = pytest.approx(of_ranks[0][precision, 1], rel=1e-6 if precision in ("fp32", "amp") else 2e-3)
    assert of_ranks[0][precision, 2] == expected and of_ranks[0][precision, 4] == expected


def test_a_bad_gradient_of_one_rank_is_seen_on_all(outcomes):
    for outcome in outcomes:
        for bad, (norm, finite) in zip(BAD, outcome["bad gradients"]):
            assert norm == pytest.approx(bad, nan_ok=True) and not finite


def test_a_state_is_never_a_part(outcomes):
    model_error, optimizer_error, *used_up = outcomes[0]["not gathered"]
    assert "RuntimeError" in model_error and "layer.experts.fc1_weight is spread over 2 processes" in model_error
    assert "RuntimeError" in optimizer_error and "layer.experts.fc1_weight is spread over 2" in optimizer_error
    assert used_up == [model_error, optimizer_error]


def test_an_error_on_one_rank_is_not_hidden_by_saving(outcomes):
    assert outcomes[1]["failing"] == "ValueError: this rank's own trouble"


def test_statistics_in_fp16_are_refused(outcomes):
    assert all("UserError: --fp16-adam-stats must be off" in outcome["fp16 statistics"] for outcome in outcomes)


def test_it_is_fairseqs_adam_by_name():
    assert OPTIMIZER_REGISTRY["mhmoe_adam"] is MHMoEAdam
    assert MHMoEAdam.__name__ == OPTIMIZER_REGISTRY["adam"].__name__
