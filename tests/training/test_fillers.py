"""Ranks that run out of batches before others: training and validation are those of one process all the same."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from parallel_runs import DENSE, MODEL, train_logs, updates_in, write_even_corpus
from torch import nn

from mhmoe_fairseq.moe import MHMoEConfig, MHMoELayer
from mhmoe_fairseq.moe.layer import taken_for_padding
from mhmoe_fairseq.parallel import expert_parallelism
from mhmoe_fairseq.training import ParallelTask

# Speed; what a step of validation has, which is a batch of every rank; and traffic, of which one process has none.
LEFT_OUT = re.compile(r"(train_|valid_)?(wps|ups|wall|train_wall|peak_gb|a2a_.*)|valid_(wpb|bsz)")
ODD_VALIDATION = ("--batch-size-valid", 6)  # 16 lines: three batches


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """An epoch of seven batches."""
    return write_even_corpus(tmp_path_factory.mktemp("corpus"), batches=7)


def story(log):
    """All figures of updates and of validations but those left out."""
    validations = [json.loads(line[line.index("{") :]) for line in log.splitlines() if '"valid_ppl"' in line]
    assert validations
    return [
        {name: figure for name, figure in record.items() if not LEFT_OUT.fullmatch(name)}
        for record in (*updates_in(log), *validations)
    ]


@pytest.mark.parametrize("model", [pytest.param(DENSE, id="dense"), pytest.param(MODEL, id="experts-on-two-ranks")])
def test_an_update_of_a_real_batch_and_a_filler(data, tmp_path, model):
    flags = (*ODD_VALIDATION, "--max-epoch", 2)
    (one,) = train_logs(1, data, tmp_path / "one", "--update-freq", 4, *flags, updates=20, model=model)
    two, _ = train_logs(2, data, tmp_path / "two", "--update-freq", 2, *flags, updates=20, model=model)
    assert [update["wpb"] for update in updates_in(one)] == ["128", "96", "128", "96"]
    assert story(two) == story(one)


def test_fillers_do_not_enter_a_balance_loss_of_all_ranks(tmp_path):
    """An epoch of one batch; in validation two batches of 6 lines, then one of 4 and a filler."""
    data = write_even_corpus(tmp_path, batches=1)
    flags = ("--update-freq", 1, "--max-epoch", 3, "--mhmoe-z-loss-wt", 0.01, "--required-batch-size-multiple", 1)
    (one,) = train_logs(1, data, tmp_path / "one", *flags, "--batch-size-valid", 12, updates=20)
    both = (*flags, "--batch-size-valid", 6, "--mhmoe-balance-scope", "global")
    two, _ = train_logs(2, data, tmp_path / "two", *both, updates=20)
    assert len(updates_in(two)) == 3 and '"a2a_rows": "128"' in two  # 32 tokens x 2 heads x top 2, of one rank
    assert story(two) == story(one)


def gradients_of(counted, parallel=None):
    """Of an update's balance loss and z-loss, by the number of sub-tokens that they are of."""
    sizes = {"embed_dim": 8, "num_heads": 2, "num_experts": 4, "top_k": 2, "expert_ffn_dim": 8}
    torch.manual_seed(0)
    layer = MHMoELayer(MHMoEConfig(**sizes, balance_scope="global"), parallel=parallel)
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1 if counted else 2))

    def criterion(model, sample):
        _, balance, z, stats, *_ = model(x, torch.zeros(2, 5, dtype=torch.bool))
        return balance + z, stats.num_subtokens, {"balance": balance.detach(), "num_subtokens": stats.num_subtokens}

    optimizer = SimpleNamespace(backward=lambda loss: loss.backward())
    layer.set_num_updates = lambda number: None
    _, size, log = Counted().train_step({"counted": counted}, layer, criterion, optimizer, 0)
    weights = ("router", "head_projection")
    return size, log, {name: p.grad for name, p in layer.named_parameters() if name.startswith(weights)}


def on_two_ranks(experts):
    return gradients_of(dist.get_rank() == 0, expert_parallelism(experts))


@pytest.mark.parametrize("experts", [1, 2])
def test_fillers_have_no_part_in_the_gradient_of_a_balance_loss_of_all_ranks(workers2, experts):
    (size, log, gradients), (none, nothing, no_gradients) = workers2.run(on_two_ranks, experts)
    expected_size, expected_log, expected = gradients_of(True)
    assert size == expected_size == 20 and log == expected_log
    assert none == 0 and nothing == {"balance": 0, "num_subtokens": 0}
    assert gradients.keys() == expected.keys() and len(gradients) > 2
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7, msg=name)
        assert not no_gradients[name].any()


class Counted(ParallelTask):
    """A task that adds figures of its own to a validation's."""

    def __init__(self):
        self.args = None

    def evaluate_batch(self, sample, model, criterion):
        loss, sample_size, log = super().evaluate_batch(sample, model, criterion)
        return loss, sample_size, {**log, "captions": 3, "parts": torch.ones(2)}


def test_what_a_task_adds_to_a_validation_is_not_counted_either():
    sample = {"counted": False}
    criterion = lambda model, sample: (torch.tensor(2.5), torch.tensor(4), {"ntokens": 4})  # noqa: E731
    loss, sample_size, log = Counted().valid_step(sample, nn.Linear(1, 1), criterion)
    assert loss == 0 and sample_size == 0 and log["ntokens"] == log["captions"] == 0
    assert log["parts"].tolist() == [0, 0] and log["parts"].dtype == torch.float32
    assert Counted().valid_step({}, nn.Linear(1, 1), criterion)[2]["captions"] == 3


@pytest.mark.parametrize("routing", ["dropless", "capacity"])
def test_nothing_is_routed_of_what_is_taken_for_padding(routing):
    config = MHMoEConfig(embed_dim=8, num_heads=2, num_experts=4, top_k=2, expert_ffn_dim=8, routing=routing)
    layer = MHMoELayer(config)
    x = torch.randn(3, 5, 8, requires_grad=True)
    before = layer(x)
    with taken_for_padding(layer):
        hidden, balance, z, stats, *_ = layer(x, torch.zeros(3, 5, dtype=torch.bool))
    assert balance == z == 0 and stats.num_subtokens == 0 and stats.expert_load.sum() == 0
    assert hidden.isfinite().all()
    with taken_for_padding(layer, applies=False):
        assert torch.equal(layer(x).stats.expert_load, before.stats.expert_load)
    assert torch.equal(layer(x).stats.expert_load, before.stats.expert_load) and before.balance_loss > 0
