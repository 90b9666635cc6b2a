"""Answers without a look at the image."""

import pytest

from mhmoe_fairseq.metrics.baselines import TextOnly

TRAINING = [
    ("what colour", {3: 1.0, 1: 0.3}),
    ("what colour", {2: 1.0}),
    ("what colour", {2: 0.3, 3: 0.3}),
    ("is it red", {5: 1.0}),
    ("is it red", {4: 1.0}),
    ("no answer", {}),
    ("what kind", {6: 1.2}),
]


@pytest.fixture
def baseline():
    return TextOnly(TRAINING)


@pytest.mark.parametrize(
    "text, label",
    [
        ("what colour", 2),  # 2 and 3 have 1.3 each: the lower one
        ("is it red", 4),
        ("what kind", 6),
        ("never seen", 2),
        ("no answer", 2),
    ],
)
def test_the_heaviest_answer_of_the_text_or_of_all(baseline, text, label):
    assert baseline.majority == 2
    assert baseline.answer(text) == label


def test_without_labels_there_is_nothing_to_learn():
    with pytest.raises(ValueError, match="no labels"):
        TextOnly([("what", {})])
