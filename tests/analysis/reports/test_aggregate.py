"""Figures over several seeds, by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mhmoe_fairseq.analysis.reports.aggregate import figures, mean_and_deviation, paired_change, spread


def runs(model: str, **perplexities: float | None) -> list[Any]:
    """``seed_1=20.0`` and so on, in the order given."""
    return [
        SimpleNamespace(
            run=SimpleNamespace(path=Path(f"runs/{model}/{name.replace('_', '-')}")),
            perplexity=lambda split, value=value: value if split == "test" else None,
        )
        for name, value in perplexities.items()
    ]


def test_changes_are_against_the_same_seed_in_any_order() -> None:
    ours = runs("mhmoe", seed_2=11.0, seed_1=16.0, seed_3=30.0, seed_4=None)
    reference = runs("dense", seed_1=20.0, seed_2=10.0, seed_4=40.0)
    assert paired_change(ours, reference, "test") == pytest.approx([0.1, -0.2])


def test_mean_and_sample_deviation() -> None:
    assert mean_and_deviation([1.0, 2.0, 6.0]) == (3.0, pytest.approx(7**0.5))
    assert mean_and_deviation([4.0]) == (4.0, None)
    assert figures(runs("a", seed_1=3.0, seed_2=None, seed_3=5.0), lambda run: run.perplexity("test")) == [3.0, 5.0]
    assert (spread([]), spread([2.0]), spread([1.0, 3.0], digits=1)) == ("–", "2.00", "2.0 ± 1.4")
