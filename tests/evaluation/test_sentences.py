"""Metrics of classified sentences, by hand."""

import numpy as np
import pytest

from mhmoe_fairseq.evaluation.sentences import UNLABELLED, Classified, accuracies

PROBABILITIES = np.array([[0.2, 0.7, 0.1], [0.5, 0.2, 0.3], [0.1, 0.3, 0.6], [0.1, 0.6, 0.3]], dtype=np.float32)


def classified(*labels: int) -> Classified:
    return Classified("test_de", ["no", "maybe", "yes"], np.array(labels), PROBABILITIES[: len(labels)])


def test_the_most_probable_class_is_predicted() -> None:
    found = classified(1, 2, 2, 2)
    assert found.predictions.tolist() == [1, 0, 2, 1]
    accuracy = accuracies([found])["accuracy"]
    assert (accuracy.value, accuracy.stderr, accuracy.count, accuracy.baselines) == (50.0, 25.0, 4, {"majority": 75.0})
    first, second, *_ = found.predicted()
    assert (first["label"], first["prediction"], first["index"], first["split"]) == ("maybe", "maybe", 0, "test_de")
    assert (second["label"], second["prediction"]) == ("yes", "no")
    assert first["probabilities"] == {"no": 0.2, "maybe": 0.7, "yes": 0.1}


def test_unknown_labels_have_no_accuracy() -> None:
    found = classified(1, UNLABELLED, 2, 2)
    assert accuracies([found]) == {}
    assert [row["label"] for row in found.predicted()] == ["maybe", None, "yes", "yes"]
    assert accuracies([classified(0, 0, 0, 0)])["accuracy"].value == 25.0


def test_all_examples_count_alike_and_so_do_languages_in_their_mean() -> None:
    metrics = accuracies([classified(1, 0, 2, 1), classified(0)])
    assert metrics["accuracy"].value == pytest.approx(80.0) and metrics["accuracy"].count == 5
    assert metrics["mean over languages"].value == 50.0
