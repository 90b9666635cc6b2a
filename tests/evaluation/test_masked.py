"""Metrics of masked positions from a criterion's sums, by hand."""

import math

import pytest

from mhmoe_fairseq.evaluation.masked import PartScore, guess, part_scores, together


def test_losses_are_bits_for_each_masked_position() -> None:
    sums = {"image_targets": 8, "image_loss": 8 * 3 * math.log(2), "image_correct": 2, "text_targets": 0}
    assert part_scores(sums) == {"image": PartScore(8, pytest.approx(3.0), 0.25)}


def test_all_positions_together_are_weighted_by_their_number() -> None:
    assert together([PartScore(30, 2.0, 0.5), PartScore(10, 6.0, 0.1)]) == PartScore(40, 3.0, pytest.approx(0.4))


def test_a_guess_without_context_is_as_good_as_the_symbols_are_uneven() -> None:
    assert guess([2, 1, 1]) == PartScore(4, 1.5, 0.5)
    assert guess([5]) == PartScore(5, 0.0, 1.0)


def test_a_metric_stands_beside_the_guess() -> None:
    metrics = PartScore(8, 3.0, 0.25).metrics(PartScore(8, 4.0, 0.125))
    assert [(name, metric.value, metric.baselines["without context"]) for name, metric in metrics.items()] == [
        ("perplexity", 8.0, 16.0), ("loss", 3.0, 4.0), ("accuracy", 25.0, 12.5),
    ]  # fmt: skip
