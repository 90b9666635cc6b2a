"""What a task of this package does when fairseq builds a model and when it validates."""

import logging
from argparse import Namespace

import pytest
import torch
from fairseq import models
from fairseq.tasks import FairseqTask
from torch import nn

from mhmoe_fairseq.training import ParallelTask


class Task(ParallelTask, FairseqTask):
    """A task of this package with nothing of its own."""


@pytest.fixture
def task():
    task = Task(Namespace())
    task.args = Namespace(save_dir="checkpoints", no_save=True)
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
