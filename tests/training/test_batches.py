"""The batches that a task gives a training: which in which epoch, and, resumed on other ranks, those not yet seen."""

import logging
from argparse import Namespace

import numpy as np
import pytest
from fairseq.data import FairseqDataset
from fairseq.data.iterators import EpochBatchIterator
from fairseq.tasks import FairseqTask

from mhmoe_fairseq.training import ParallelTask, ResumableEpochBatchIterator

BATCHES = 24


class Numbers(FairseqDataset):
    def __getitem__(self, index):
        return index

    def __len__(self):
        return BATCHES

    def collater(self, samples):
        return samples


def iterators(ranks, **options):
    """One for each rank, over batches of one number."""
    dataset = Numbers()
    batches = [[number] for number in range(BATCHES)]
    return [
        ResumableEpochBatchIterator.of(
            EpochBatchIterator(dataset, dataset.collater, batches, seed=7, num_shards=ranks, shard_id=rank, **options)
        )
        for rank in range(ranks)
    ]


def rounds(epoch_iterators):
    """What all ranks see in each round, to the end of the epoch."""
    running = [iterator.next_epoch_itr() for iterator in epoch_iterators]
    while running[0].has_next():
        yield sorted(number for rank in running for batch in [next(rank)] for number in batch)


def seen_in(some_rounds):
    return [number for one in some_rounds for number in one]


def train_and_save(ranks, batches):
    """The state after ``batches`` of the epoch, and them."""
    epoch_iterators = iterators(ranks)
    going = rounds(epoch_iterators)
    seen = seen_in(next(going) for _ in range(batches // ranks))
    states = [iterator.state_dict() for iterator in epoch_iterators]
    assert states.count(states[0]) == ranks  # any rank may save
    return states[0], seen


@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_the_rest_of_the_epoch_comes_once(before, after):
    state, seen = train_and_save(before, 12)
    resumed = iterators(after)
    for iterator in resumed:
        iterator.load_state_dict(dict(state))
    rest = seen_in(rounds(resumed))
    assert sorted(seen + rest) == list(range(BATCHES))
    straight = seen_in(rounds(iterators(after)))
    assert rest == straight[12:]  # in the order of a run that never stopped
    assert resumed[0].epoch == 1


def test_a_place_between_two_rounds_repeats_and_warns(caplog):
    state, seen = train_and_save(2, 6)
    resumed = iterators(4)
    with caplog.at_level(logging.INFO):
        for iterator in resumed:
            iterator.load_state_dict(dict(state))
    rest = seen_in(rounds(resumed))
    assert set(seen) | set(rest) == set(range(BATCHES)) and len(set(seen) & set(rest)) == 2
    assert "resuming on 4 ranks what 2 saved, after 6 batches" in caplog.text
    assert "2 of them will be seen again" in caplog.text


def test_grouped_shuffling_is_told(caplog):
    state, _ = train_and_save(2, 8)
    iterators(4, grouped_shuffling=True)[0].load_state_dict(state)
    assert "--grouped-shuffling orders an epoch by the number of ranks (2 when saved, 4 now)" in caplog.text


def test_the_end_of_an_epoch_is_the_next_ones_start():
    state, _ = train_and_save(2, BATCHES)
    assert (state["epoch"], state["iterations_in_epoch"]) == (2, 0)
    [resumed] = iterators(1)
    resumed.load_state_dict(state)
    assert len(seen_in(rounds([resumed]))) == BATCHES and resumed.epoch == 2


def test_states_of_stock_fairseq_are_taken_as_they_are(caplog):
    state, _ = train_and_save(2, 8)
    del state["num_shards"]
    resumed = iterators(2)
    for iterator in resumed:
        iterator.load_state_dict(dict(state))
    assert len(seen_in(rounds(resumed))) == BATCHES - 8
    assert not caplog.text


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
