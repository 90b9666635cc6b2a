"""Figures of masked positions and expert loads from a criterion's sums, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from mhmoe_fairseq.evaluation.modality_scores import ModalityScores, PartScore, _parts, expert_counts, guess


def test_losses_are_bits_for_each_masked_position() -> None:
    sums = {"image_targets": 8, "image_loss": 8 * 3 * math.log(2), "image_correct": 2, "text_targets": 0}
    assert _parts(sums) == {"image": PartScore(8, pytest.approx(3.0), 0.25)}


def test_rows_of_pools_belong_to_their_layer() -> None:
    """Two layers with a pool for images and one for texts; no text came to the second layer's."""
    sums = {
        "moe_load": torch.tensor([[4.0, 0.0], [1.0, 3.0], [2.0, 2.0], [0.0, 0.0]]),
        "moe_dropped": torch.tensor([1.0, 0.0, 2.0, 0.0]),
        "moe_entropy_sum": torch.tensor([2.0, 4.0, 6.0, 0.0]),
        "moe_subtokens": torch.tensor([4.0, 4.0, 4.0, 0.0]),
    }
    counts = expert_counts(sums, [1, 3])
    assert counts.layers == [1, 1, 3]
    assert counts.load == [[4.0, 0.0], [1.0, 3.0], [2.0, 2.0]]
    assert (counts.dropped, counts.entropy) == ([1.0, 0.0, 2.0], [0.5, 1.0, 1.5])


def test_all_positions_together_are_weighted_by_their_number() -> None:
    scores = ModalityScores({"image": PartScore(30, 2.0, 0.5), "text": PartScore(10, 6.0, 0.1)}, {})
    assert (scores.total.targets, scores.total.loss, scores.total.accuracy) == (40, 3.0, pytest.approx(0.4))
    assert scores.total.perplexity == 8.0


def test_a_guess_without_context_is_as_good_as_the_symbols_are_uneven() -> None:
    assert guess([5, 5, 5, 5]) == PartScore(20, 2.0, 0.25)
    assert guess([7]) == PartScore(7, 0.0, 1.0)
    assert guess([2, 1, 1]).loss == 1.5
