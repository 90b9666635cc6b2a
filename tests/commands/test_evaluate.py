"""``mhmoe evaluate`` on a model of one text; of several languages see tests/tasks/test_multilingual_training.py."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from console import evaluate, evaluated

from mhmoe_fairseq.commands.main import main


def test_one_text_has_a_total_only_which_is_fairseqs(runs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = runs.copy("mhmoe", tmp_path / "mhmoe")
    words = [run / "checkpoint_last.pt", "--data", runs.data, "--json", run / "eval-test.json"]
    assert main(["evaluate", *map(str, words)]) == 0
    printed = evaluated((runs.mhmoe / "eval-test.log").read_text())
    total = json.loads((run / "eval-test.json").read_text())["total"]
    assert (f"{total['loss']:.4f}", f"{total['perplexity']:.2f}", total["tokens"]) == (
        f"{printed.loss:.4f}", f"{printed.perplexity:.2f}", printed.tokens,
    )  # fmt: skip
    assert capsys.readouterr().out.count("\n| ") == 1  # below the header


def test_languages_of_a_model_of_one_text(runs, capsys: pytest.CaptureFixture) -> None:
    words = [runs.dense / "checkpoint_last.pt", "--data", runs.data, "--langs", "de"]
    assert main(["evaluate", *map(str, words)]) == 2
    assert "was trained on one text, not on several languages" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ("--tokens-per-sample", 1024),
            r"blocks are longer than the model's \d+ positions .* give --tokens",
        ),
        (("--context-window", 4096), r"--tokens-per-sample \(-\d+\) must be at least 1; .* --context-window"),
    ],
)
def test_no_figure_comes_of_an_empty_set(runs, flags: tuple, message: str) -> None:
    """1024 is fairseq's block length where none is given."""
    log = evaluate(runs.data, runs.dense / "checkpoint_last.pt", *flags, check=False)
    assert re.search(f"UserError: .*{message}", log) and "Perplexity" not in log
