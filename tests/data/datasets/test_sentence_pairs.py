"""What a causal language model reads of a sentence or a pair, and how over-long ones are cut."""

import numpy as np
import pytest
import torch
from fairseq.data import ListDataset

from mhmoe_fairseq.data.datasets.sentence_pairs import LabelledSentences, cut_longest_first

PAD, EOS = 1, 2


def sentences(*lengths, first=10):
    """Sentences of the words 10, 11, ... with the end mark."""
    items = [torch.tensor([*range(first, first + length), EOS]) for length in lengths]
    return ListDataset(items, np.array([len(item) for item in items]))


def dataset(*columns, longest=50, seed=None, labels=None, starts=None):
    count = len(columns[0])
    labels = np.arange(count) % 3 if labels is None else np.array(labels)
    starts = np.full(count, EOS) if starts is None else np.array(starts)
    return LabelledSentences(columns, labels, starts, longest=longest, pad=PAD, seed=seed)


def cut_one_by_one(first, second, room):
    while first + second > room:
        if first > second:
            first -= 1
        else:
            second -= 1
    return first, second


def test_a_sentence_and_a_pair():
    single = dataset(sentences(2, 1))
    assert single[0]["tokens"].tolist() == [EOS, 10, 11, EOS]
    assert single[1] == {"id": 1, "tokens": pytest.approx([EOS, 10, EOS]), "target": 1}
    pair = dataset(sentences(2, 1), sentences(1, 3, first=20), starts=[7, 8])
    assert pair[0]["tokens"].tolist() == [7, 10, 11, EOS, 20, EOS]
    assert pair[1]["tokens"].tolist() == [8, 10, EOS, 20, 21, 22, EOS]
    assert pair.sizes.tolist() == [6, 7] and pair.num_cut == 0


def test_long_sentences_lose_their_end():
    single = dataset(sentences(9, 4), longest=6)
    assert single[0]["tokens"].tolist() == [EOS, 10, 11, 12, 13, EOS]
    assert single[1]["tokens"].tolist() == [EOS, 10, 11, 12, 13, EOS]
    assert single.num_cut == 1


def test_the_longer_sentence_is_cut_first_and_the_second_of_equal_ones():
    generator = np.random.default_rng(0)
    first, second = generator.integers(1, 15, size=(2, 300))
    for room in (2, 5, 8, 13, 40):
        kept = cut_longest_first([first, second], room)
        expected = [cut_one_by_one(a, b, room) for a, b in zip(first, second)]
        assert list(zip(*(part.tolist() for part in kept))) == expected


def test_sizes_are_those_of_the_items():
    pair = dataset(sentences(9, 1, 5, 7), sentences(2, 9, 5, 7, first=40), longest=12)
    assert [len(pair[index]["tokens"]) for index in range(4)] == pair.sizes.tolist()
    assert pair.sizes.max() == 12 and pair.num_cut == 4
    assert pair[3]["tokens"].tolist() == [2, 10, 11, 12, 13, 14, 2, 40, 41, 42, 43, 2]


@pytest.mark.parametrize("columns, least", [(1, 3), (2, 5)])
def test_room_for_a_token_of_each_sentence(columns, least):
    parts = [sentences(9)] * columns
    assert len(dataset(*parts, longest=least)[0]["tokens"]) == least
    with pytest.raises(ValueError, match=rf"--tokens-per-sample \({least - 1}\) must be at least {least}"):
        dataset(*parts, longest=least - 1)


def test_batches_are_padded_on_the_right():
    data = dataset(sentences(3, 1))
    batch = data.collater([data[0], data[1]])
    assert batch["net_input"]["src_tokens"].tolist() == [[2, 10, 11, 12, 2], [2, 10, 2, 1, 1]]
    assert batch["target"].tolist() == [0, 1] and batch["id"].tolist() == [0, 1]
    assert (batch["nsentences"], batch["ntokens"]) == (2, 8)
    assert data.collater([]) == {}


def test_order_is_by_length_and_by_the_seed():
    lengths = np.random.default_rng(0).integers(1, 5, size=40).tolist()
    plain = dataset(sentences(*lengths)).ordered_indices()
    assert plain.tolist() == sorted(range(40), key=lambda index: lengths[index])
    one, again, two = (dataset(sentences(*lengths), seed=seed).ordered_indices().tolist() for seed in (1, 1, 2))
    assert one == again != two and one != plain.tolist()
    assert [lengths[index] for index in one] == sorted(lengths)


@pytest.mark.parametrize("multiple", [1, 8])
def test_batches_hold_every_example(multiple):
    data = dataset(sentences(*[3, 1, 2] * 7))
    batches = data.batch_by_size(data.ordered_indices(), max_sentences=4, required_batch_size_multiple=multiple)
    assert sorted(index for batch in batches for index in batch) == list(range(21))
