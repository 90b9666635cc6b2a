"""Resuming on another number of ranks continues with the batches that have not been seen."""

from __future__ import annotations

import logging

import pytest
from fairseq.data import FairseqDataset
from fairseq.data.iterators import EpochBatchIterator

from mhmoe_fairseq.training import ResumableEpochBatchIterator

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
