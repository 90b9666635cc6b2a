"""Batches of every modality: orders, visits, epochs, and held-out sets that count every sample once."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from fairseq.data import FairseqDataset

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.data.datasets.modalities import EvaluationModalities, TrainingModalities

COUNTS = {"image": 7, "text": 20, "pair": 20}


class Numbers(FairseqDataset):
    """Samples that tell their number and the epoch in which they were asked for."""

    def __init__(self, count: int, tokens: int) -> None:
        self.count = count
        self.tokens = tokens
        self.epoch = 1

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[int, int]:
        return int(index), self.epoch

    def collater(self, samples: list[tuple[int, int]]) -> dict[str, Any]:
        return {"samples": samples, "nsentences": len(samples)}

    def num_tokens(self, index: int) -> int:
        return self.tokens + int(index) % 2

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        return np.array([self.num_tokens(index) for index in indices], dtype=np.int32)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def parts(**counts: int) -> dict[str, Numbers]:
    return {name: Numbers(count, 10) for name, count in (counts or COUNTS).items()}


def epoch_of(dataset: TrainingModalities, epoch: int, name: str) -> list[tuple[int, int]]:
    dataset.set_epoch(epoch)
    return [dataset[index][name] for index in dataset.ordered_indices()]


def test_an_epoch_is_one_visit_of_the_largest_modality() -> None:
    dataset = TrainingModalities(parts(), seed=1)
    assert len(dataset) == 20
    for epoch in (1, 2, 3):
        seen = epoch_of(dataset, epoch, "text")
        assert sorted(number for number, _ in seen) == list(range(20))
        assert {visit for _, visit in seen} == {epoch}


def test_a_smaller_modality_goes_round_and_goes_on_in_the_next_epoch() -> None:
    dataset = TrainingModalities(parts(), seed=1)
    stream = [sample for epoch in range(1, 8) for sample in epoch_of(dataset, epoch, "image")]
    assert len(stream) == 7 * 20
    for visit in range(20):
        one = stream[7 * visit : 7 * (visit + 1)]
        assert sorted(number for number, _ in one) == list(range(7))
        assert {seen_in for _, seen_in in one} == {visit + 1}  # its masks are drawn anew on every visit


def test_orders_differ_by_visit_modality_and_seed_only() -> None:
    first, again, other = (TrainingModalities(parts(), seed) for seed in (1, 1, 2))
    texts = epoch_of(first, 1, "text")
    assert texts == epoch_of(again, 1, "text")
    orders = [
        tuple(number for number, _ in order)
        for order in (
            texts, epoch_of(first, 1, "pair"), epoch_of(first, 2, "text"), epoch_of(other, 1, "text"),
        )
    ]  # fmt: skip
    assert len(set(orders)) == 4
    without_pairs = TrainingModalities(parts(image=7, text=20), seed=1)
    assert epoch_of(without_pairs, 1, "text") == texts


def test_a_batch_has_as_many_samples_of_each_modality() -> None:
    dataset = TrainingModalities(parts(), seed=1)
    dataset.set_epoch(1)
    batches = dataset.batch_by_size(dataset.ordered_indices(), max_sentences=6, required_batch_size_multiple=8)
    assert [len(batch) for batch in batches] == [6, 6, 6, 2]  # the last one is not lost
    batch = dataset.collater([dataset[index] for index in batches[0]])
    assert batch["nsentences"] == 6
    assert {name: batch[name]["nsentences"] for name in COUNTS} == dict.fromkeys(COUNTS, 6)


@pytest.mark.parametrize("kind", [TrainingModalities, EvaluationModalities])
def test_batches_are_limited_by_the_positions_of_all_modalities(kind: type) -> None:
    dataset = kind(parts(), 1) if kind is TrainingModalities else kind(parts())
    indices = dataset.ordered_indices()
    for batch in dataset.batch_by_size(indices, max_tokens=80):
        assert len(batch) * max(dataset.num_tokens(index) for index in batch) <= 80
    assert all(dataset.size(index) == dataset.num_tokens(index) for index in indices)
    assert np.array_equal(dataset.filter_indices_by_size(indices, 5)[0], indices)
    longest = max(dataset.num_tokens(index) for index in indices)
    with pytest.raises(UserError, match=rf"--max-tokens \({longest - 1}\) must be at least {longest}"):
        dataset.batch_by_size(indices, max_tokens=longest - 1)


@pytest.mark.parametrize("counts", [COUNTS, {"image": 1, "text": 13}, {"pair": 5}, {"image": 12, "text": 13}])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_held_out_set_counts_every_sample_once(counts: dict[str, int], batch_size: int) -> None:
    dataset = EvaluationModalities(parts(**counts))
    seen = {name: Counter() for name in counts}
    for indices in dataset.batch_by_size(dataset.ordered_indices(), max_sentences=batch_size):
        batch = dataset.collater([dataset[index] for index in indices])
        for name in counts:
            assert batch[name]["nsentences"] >= 1  # experts are called for every modality in every batch
            if batch[name]["counted"]:
                seen[name].update(number for number, _ in batch[name]["samples"])
    assert seen == {name: Counter(range(count)) for name, count in counts.items()}


def test_samples_of_a_held_out_set_are_spread_evenly() -> None:
    dataset = EvaluationModalities(parts(image=10, text=40))
    for indices in dataset.batch_by_size(dataset.ordered_indices(), max_sentences=8):
        batch = dataset.collater([dataset[index] for index in indices])
        assert (batch["image"]["nsentences"], batch["text"]["nsentences"]) == (2, 8)


@pytest.mark.parametrize("kind", [TrainingModalities, EvaluationModalities])
def test_an_item_has_samples_of_modalities_and_nothing_else(kind: type) -> None:
    dataset = kind(parts(), 1) if kind is TrainingModalities else kind(parts())
    assert dataset[0].keys() == COUNTS.keys()


def test_nothing_to_collate() -> None:
    assert TrainingModalities(parts(), 1).collater([]) == EvaluationModalities(parts()).collater([]) == {}
