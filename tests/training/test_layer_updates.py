"""Modules that act after an update are told the loads of its batches, of all ranks, and of no skipped one."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from fairseq.optim.amp_optimizer import AMPOptimizer
from fairseq.tasks import FairseqTask
from torch import nn
from torch.utils.checkpoint import checkpoint

from mhmoe_fairseq.moe import MHMoEConfig, MHMoELayer
from mhmoe_fairseq.moe.balancing import BALANCINGS
from mhmoe_fairseq.moe.router import LinearRouter
from mhmoe_fairseq.training import ParallelTask
from mhmoe_fairseq.training.layer_updates import LayerUpdates


class Listening(LinearRouter):
    """Keeps what it is told."""

    def after_update(self, sums):
        self.told = [*getattr(self, "told", []), sums.stats.expert_load.tolist()]


class Model(nn.Module):
    def __init__(self, recomputes=False, **fields):
        super().__init__()
        torch.manual_seed(0)
        fields = {"embed_dim": 8, "num_heads": 2, "num_experts": 4, "top_k": 1, "expert_ffn_dim": 8, **fields}
        self.layer, self.recomputes = MHMoELayer(MHMoEConfig(router="linear", **fields)), recomputes
        self.layer.router.__class__ = Listening
        self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, x):
        return checkpoint(self._forward, x, use_reentrant=False) if self.recomputes else self._forward(x)

    def _forward(self, x):
        return self.layer(x).hidden.sin()  # whose derivative needs all of the layer computed once more

    def set_num_updates(self, number):
        pass


class Task(ParallelTask, FairseqTask):
    """A task of this package with nothing of its own."""


def batches(count, seed=0):
    return torch.randn(count, 3, 8, generator=torch.Generator().manual_seed(seed)).unbind()


def told_of(updates, recomputes=False, steps=None):
    """What the router is told in a training whose updates are lists of batches; a step may be left out, or not made."""
    return getattr(after_updates(Model(recomputes), updates, steps).layer.router, "told", [])


def bias_after(updates, balancing, recomputes=False, **fields):
    """The selection bias after a training."""
    return after_updates(Model(recomputes, balancing=balancing, **fields), updates).layer.gate.balancing.bias


def after_updates(model, updates, steps=None):
    task = Task(Namespace())
    task._layer_updates = LayerUpdates(model)
    optimizer = SimpleNamespace(backward=lambda loss: loss.backward(), step=lambda: None)
    for number, update in enumerate(updates):
        model.zero_grad()
        for x in update:
            task.train_step({"x": x}, model, lambda m, s: (m(s["x"]).sum(), 1, {}), optimizer, number)
        if steps is None or steps[number]:
            task.optimizer_step(optimizer, model, number)
    return model


@pytest.mark.parametrize("recomputes", [False, True])
def test_loads_are_of_all_batches_of_an_update_and_of_no_other(recomputes):
    one, two, three = batches(3)
    told = told_of([[one, two], [three]], recomputes)
    assert [sum(loads) for loads in told] == [12, 6]  # 3 tokens of 2 sub-tokens in each batch
    assert told_of([[three]]) == told[1:]


def test_a_skipped_update_is_forgotten():
    one, two = batches(2)
    assert told_of([[one], [two]], steps=[False, True]) == told_of([[two]])


def test_a_step_that_amp_leaves_out_tells_nothing():
    model = Model()
    updates, scales = LayerUpdates(model), [8.0, 4.0, 4.0, 4.0]
    optimizer = AMPOptimizer.__new__(AMPOptimizer)
    optimizer._grad_scaler = SimpleNamespace(get_scale=lambda: scales.pop(0))
    for count in (0, 1):
        updates.begin_batch()
        model(batches(1)[0])
        with updates.after(optimizer):
            pass
        assert len(getattr(model.layer.router, "told", [])) == count


def test_what_is_evaluated_within_an_update_does_not_count():
    model = Model()
    updates = LayerUpdates(model)
    optimizer = SimpleNamespace(step=lambda: None)
    updates.begin_batch()
    model(batches(1)[0])
    model.eval()(batches(1, seed=1)[0])
    with updates.after(optimizer):
        pass
    assert sum(model.layer.router.told[0]) == 6


balancings = pytest.mark.parametrize("balancing", [name for name in BALANCINGS if name != "none"])


@balancings
@pytest.mark.parametrize("recomputes", [False, True])
def test_a_bias_moves_by_all_batches_of_an_update_as_by_one(balancing, recomputes):
    one, two, three = batches(3)
    together = bias_after([[torch.cat([one, two])], [three]], balancing)
    assert torch.equal(bias_after([[one, two], [three]], balancing, recomputes), together) and together.any()


def on_rank(balancing=None):
    own = [[batch] for batch in batches(4)[dist.get_rank() :: 2]]
    return told_of(own) if balancing is None else bias_after(own, balancing).tolist()


def test_loads_are_of_all_ranks(workers2):
    first, second, third, fourth = batches(4)
    assert workers2.run(on_rank) == [told_of([[first, second], [third, fourth]])] * 2


@balancings
def test_a_bias_is_that_of_all_ranks(balancing, workers2):
    first, second, third, fourth = batches(4)
    expected = bias_after([[first, second], [third, fourth]], balancing).tolist()
    assert workers2.run(on_rank, balancing) == [expected] * 2


@pytest.mark.parametrize("top_k, factor", [(1, 1.2), (3, 1 / 1.2)])
def test_what_goes_by_all_layers_is_told_of_all_layers(top_k, factor):
    """ReMoE: of one layer all experts are used, of the other none, of both half; routers are told their own loads."""
    models = nn.ModuleList([Model(routing="relu", top_k=top_k, num_heads=1) for _ in range(2)])
    updates = LayerUpdates(models)
    for model, logit in zip(models, (1.0, -1.0)):
        nn.init.constant_(model.layer.router.weight, logit)
        model(torch.ones(3, 8))
    with updates.after(SimpleNamespace()):
        pass
    assert [model.layer.router.told for model in models] == [[[3.0] * 4], [[0.0] * 4]]
    assert [model.layer.gate.adaptive.weight.item() for model in models] == pytest.approx([factor * 1e-8] * 2, 1e-6, 0)


def test_a_model_without_such_modules_adds_up_nothing():
    layer = MHMoELayer(MHMoEConfig(embed_dim=8, num_experts=4, expert_ffn_dim=8))
    LayerUpdates(layer)
    assert not layer._forward_hooks
