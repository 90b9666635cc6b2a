"""Figures of classified sentences, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mhmoe_fairseq.evaluation.classify import UNLABELLED, Classified

PROBABILITIES = np.array([[0.2, 0.7, 0.1], [0.5, 0.2, 0.3], [0.1, 0.3, 0.6], [0.1, 0.6, 0.3]], dtype=np.float32)


def classified(*labels: int) -> Classified:
    return Classified("test_de", ["no", "maybe", "yes"], np.array(labels), PROBABILITIES)


def test_the_most_probable_class_is_predicted() -> None:
    found = classified(1, 2, 2, 2)
    assert found.predictions.tolist() == [1, 0, 2, 1]
    assert (found.accuracy, found.majority) == (50.0, 75.0)
    first, second, *_ = found.records()
    assert (first["label"], first["prediction"], first["index"], first["split"]) == ("maybe", "maybe", 0, "test_de")
    assert (second["label"], second["prediction"]) == ("yes", "no")
    assert first["probabilities"] == {"no": 0.2, "maybe": 0.7, "yes": 0.1}


def test_unknown_labels() -> None:
    found = classified(1, UNLABELLED, 2, 2)
    assert not found.is_labelled and classified(0, 0, 0, 0).is_labelled
    assert [record["label"] for record in found.records()] == ["maybe", None, "yes", "yes"]
    assert classified(0, 0, 0, 0).accuracy == pytest.approx(25.0)
