"""What a task of this package does when fairseq builds a model and when it validates, and what it says at the start."""

import logging
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from console import evaluate
from fairseq import models
from fairseq.tasks import FairseqTask
from parallel_runs import DENSE, train_logs, write_even_corpus
from torch import nn
from workers import WorkerError

from mhmoe_fairseq.training import ParallelTask


class Task(ParallelTask, FairseqTask):
    """A task of this package with nothing of its own."""


@pytest.fixture
def task():
    task = Task(Namespace())
    task.args = Namespace(save_dir="checkpoints", no_save=True, mhmoe_load_log=None)
    return task


@pytest.mark.parametrize("from_checkpoint", [False, True])
def test_experts_are_spread_in_training_and_whole_in_a_loaded_model(task, monkeypatch, from_checkpoint):
    asked = []
    monkeypatch.setattr(models, "build_model", lambda args, task, *_: asked.append(task.is_training) or nn.Linear(2, 2))
    for earlier in (True, False):  # a task may have built another model before
        task.is_training = earlier
        task.build_model(Namespace(), from_checkpoint)
    assert asked == [not from_checkpoint] * 2


def test_each_validation_reports_its_first_bad_batch(task, caplog):
    model = nn.Linear(2, 2)
    good, bad = torch.tensor(1.0), torch.tensor(float("nan"))
    with caplog.at_level(logging.ERROR):
        for epoch in (1, 2):
            task.begin_valid_epoch(epoch, model)
            for loss in (good, bad, bad):
                assert task.valid_step({"nsentences": 1}, model, lambda _, sample, loss=loss: (loss, 1, {}))[0] is loss
    assert [message.splitlines()[0].split(":")[0] for message in caplog.messages] == ["validation"] * 2


def test_with_spread_experts_no_rank_validates_again_alone(task, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)

    def full(model, sample):
        raise RuntimeError("CUDA out of memory")

    for spread in (False, True):  # fairseq tries again where it reads these words
        task.has_spread_experts = spread
        with pytest.raises(RuntimeError) as caught:
            task.valid_step({"nsentences": 1}, nn.Linear(2, 2), full)
        assert ("out of memory" in str(caught.value)) == (not spread)


UNBALANCED = "leaves out the MoE layers' balance loss"
BY_BATCH = "which tokens an expert takes depends on the other rows of the batch"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_even_corpus(tmp_path_factory.mktemp("corpus"), batches=4)


def test_a_criterion_without_the_balance_loss_and_routing_by_capacity(data: Path, tmp_path: Path) -> None:
    capacity = ("--mhmoe-routing", "capacity", "--criterion", "cross_entropy")
    (log,) = train_logs(1, data, tmp_path / "run", *capacity, updates=1)
    assert log.count(f"--criterion (CrossEntropyCriterion) {UNBALANCED}") == 1 and log.count(BY_BATCH) == 1
    log = evaluate(data, tmp_path / "run/checkpoint_last.pt", "--tokens-per-sample", 16)
    assert log.count(BY_BATCH) == 1 and UNBALANCED not in log and "Perplexity" in log


def test_nobody_else_is_told(data: Path, tmp_path: Path) -> None:
    (log,) = train_logs(1, data, tmp_path / "experts", updates=1)
    (dense,) = train_logs(1, data, tmp_path / "dense", "--criterion", "cross_entropy", updates=1, model=DENSE)
    for text in (log, dense):
        assert UNBALANCED not in text and BY_BATCH not in text


def test_the_default_backend_needs_gpus(data: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"--ddp-backend \(pytorch_ddp\) needs a GPU .*: on CPUs give .* legacy_ddp"):
        train_logs(2, data, tmp_path / "run", "--ddp-backend", "pytorch_ddp", updates=1, model=DENSE)
