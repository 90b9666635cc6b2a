"""Each language's figures of a validation, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from fairseq.logging import metrics

from mhmoe_fairseq.tasks.multilingual_language_modeling import language_sums, log_languages

LOSSES = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 0.0], [7.0, 8.0, 9.0], [0.0, 0.0, 0.0]])
SAMPLE = {
    "target": torch.tensor([[5, 6, 2], [7, 2, 1], [8, 9, 2], [1, 1, 1]]),  # a last row of padding alone
    "languages": torch.tensor([2, 0, 2]),
    "characters": torch.tensor([10.0, 3.0, 14.0]),
}


def test_sums_are_of_each_languages_rows_without_padding() -> None:
    sums = language_sums(SAMPLE, LOSSES.flatten(), 3, pad=1)
    assert {key: value.tolist() for key, value in sums.items()} == {
        "language_loss": [9.0, 0.0, 30.0], "language_tokens": [2.0, 0.0, 6.0], "language_characters": [3.0, 0.0, 24.0],
    }  # fmt: skip


def test_figures_are_of_all_batches_together() -> None:
    sums = language_sums(SAMPLE, LOSSES.flatten(), 3, pad=1)
    other = {**SAMPLE, "languages": torch.tensor([0, 0, 2])}
    with metrics.aggregate(new_root=True) as logged:
        for sample in (SAMPLE, other):
            log_languages(["de", "en", "fr"], [language_sums(sample, LOSSES.flatten(), 3, pad=1)])
        found = logged.get_smoothed_values()
    assert "ppl_en" not in found
    assert found["ppl_de"] == pytest.approx(math.exp((9 + 15) / (2 + 5)), abs=0.01)
    assert found["ppl_fr"] == pytest.approx(math.exp((30 + 24) / (6 + 3)), rel=1e-3)
    assert found["bpc_de"] == pytest.approx((9 + 15) / (3 + 13) / math.log(2), abs=1e-4)
    assert found["bpc"] == pytest.approx(2 * 39 / (2 * 27) / math.log(2), abs=1e-4)
    assert sums.keys() >= {"language_loss", "language_tokens"}
