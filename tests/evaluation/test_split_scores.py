"""Figures of a split and its languages, by hand."""

from __future__ import annotations

import pytest

from mhmoe_fairseq.evaluation.split_scores import Score, total_of


def test_figures_of_a_text() -> None:
    score = Score(tokens=30, loss=4.0, characters=60.0)
    assert (score.perplexity, score.bits_per_character) == (16.0, 2.0)
    assert Score(30, 4.0).bits_per_character is None


def test_languages_count_by_their_tokens() -> None:
    total = total_of([Score(30, 2.0, 60.0), Score(10, 6.0, 15.0)])
    assert total == Score(40, pytest.approx(3.0), 75.0)
    assert total.bits_per_character == pytest.approx(3.0 * 40 / 75)
    assert total_of([Score(30, 2.0, 60.0), Score(10, 6.0)]).characters is None
