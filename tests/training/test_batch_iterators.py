"""The iterators that a task gives a training: which batches in which epoch, resumed or not."""

from __future__ import annotations

from argparse import Namespace

import numpy as np
import pytest
from fairseq.data import FairseqDataset
from fairseq.tasks import FairseqTask

from mhmoe_fairseq.training import ParallelTask, ResumableEpochBatchIterator


class Shuffled(FairseqDataset):
    """Numbers in a random order, so that batches tell with which seed they were formed."""

    def __init__(self, changes_by_epoch: bool) -> None:
        self.epoch = 1
        self.changes_by_epoch = changes_by_epoch

    @property
    def can_reuse_epoch_itr_across_epochs(self):
        return not self.changes_by_epoch

    def __getitem__(self, index):
        return int(index) + 100 * self.epoch

    def __len__(self):
        return 12

    def ordered_indices(self):
        return np.random.permutation(len(self))

    def num_tokens(self, index):
        return 1

    size = num_tokens

    def collater(self, samples):
        return samples

    def set_epoch(self, epoch):
        self.epoch = epoch


class Task(ParallelTask, FairseqTask):
    """A task of this package with nothing of its own."""


def iterator_of(dataset, epoch, task=None):
    task = task or Task(Namespace())
    return task.get_batch_iterator(dataset, epoch=epoch, max_sentences=3, seed=1)


@pytest.mark.parametrize("changes_by_epoch", [False, True])
def test_a_run_that_goes_on_has_the_batches_of_one_that_never_stopped(changes_by_epoch):
    dataset = Shuffled(changes_by_epoch)
    task = Task(Namespace())
    for epoch in (1, 2, 3):  # as fairseq's trainer asks for them
        going = iterator_of(dataset, epoch, task)
    resumed = iterator_of(Shuffled(changes_by_epoch), 3)
    assert isinstance(resumed, ResumableEpochBatchIterator)
    formed = [
        sorted(tuple(int(number) for number in batch) for batch in each.frozen_batches) for each in (going, resumed)
    ]
    assert formed[0] == formed[1]
    first = sorted(tuple(map(int, batch)) for batch in iterator_of(Shuffled(changes_by_epoch), 1).frozen_batches)
    assert changes_by_epoch or formed[1] == first


@pytest.mark.parametrize("changes_by_epoch", [False, True])
def test_a_resumed_data_set_is_in_its_epoch(changes_by_epoch):
    dataset = Shuffled(changes_by_epoch)
    iterator = iterator_of(dataset, 3)
    assert dataset.epoch == iterator.epoch == 3
    samples = [number for batch in iterator.next_epoch_itr(shuffle=False) for number in batch]
    assert sorted(samples) == list(range(300, 312))
