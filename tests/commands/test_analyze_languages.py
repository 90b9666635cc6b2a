"""``mhmoe analyze`` on a model of several languages."""

import re
from pathlib import Path

import numpy as np
import pytest
from console import train
from multilingual_data import LANGUAGES, write_languages

from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.evaluation.records import read_record

MHMOE = ("--moe-expert-count", 4, "--moe-ffn-dim", 16, "--mhmoe-heads-number", 2, "--moe-top-k", 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_languages(tmp_path_factory.mktemp("languages") / "data")


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with experts, evaluated on the test split."""
    run = tmp_path_factory.mktemp("runs") / "mhmoe"
    flags = [
        "--task", "mhmoe_multilingual_language_modeling", "--multilang-sampling-alpha", 0.5, "--disable-validation",
        "--decoder-embed-dim", 32, "--decoder-attention-heads", 2, "--batch-size", 32, "--tokens-per-sample", 24,
    ]  # fmt: skip
    train(data, run, "mhmoe_lm_tiny", *MHMOE, *flags, max_update=6)
    words = ["--data", data, "--split", "test", "--record", run / "kept.json"]
    assert main(["evaluate", str(run / "checkpoint_last.pt"), *map(str, words)]) == 0
    return run


def test_analysis_by_language(data: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["analyze", run / "checkpoint_last.pt", "--data", data, "--split", "test", "--out", tmp_path]
    assert main([*map(str, words)]) == 0
    output = capsys.readouterr().out
    record = read_record(tmp_path / "routing-test.json")
    assert list(record.parts) == record.experts.parts == LANGUAGES
    [whole] = record.experts.of(None).layers
    assert whole.layer == 1
    assert np.array([record.experts.of(part).layers[0].loads for part in LANGUAGES]).sum(0).tolist() == whole.loads
    expected = read_record(run / "kept.json")
    heads, top_k = 2, 2
    for language in LANGUAGES:
        score, loss = expected.parts[language]["loss"], record.parts[language]["loss"]
        assert (loss.count, loss.value) == (score.count, pytest.approx(score.value, abs=1e-4))
        assert sum(record.experts.of(language).layers[0].loads) == score.count * heads * top_k
        assert re.search(rf"\| {language} +\| +{score.count:,} \|", output)
    assert record.metrics["loss"].value == pytest.approx(expected.metrics["loss"].value, abs=1e-4)
    assert 0 <= record.metrics["load in common"].value <= 100
    assert 0 <= record.metrics["language guessed right"].value <= 100
    tokens = np.array([record.parts[language]["loss"].count for language in LANGUAGES])
    pieces = np.minimum(np.ceil(tokens / 24), 100).astype(int) // 2
    assert [[sum(row) for row in guesses] for guesses in record.settings["guesses"]] == 2 * [pieces.tolist()]
    for name in ("routing-test.png", "routing-test-load.png", "routing-test-overlap.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "most often taken for" in output and "chance is 25.0 %" in output


def test_analysis_of_one_language(data: Path, run: Path, tmp_path: Path) -> None:
    words = ["--data", data, "--split", "test_zh", "--out", tmp_path]
    assert main(["analyze", str(run / "checkpoint_last.pt"), *map(str, words)]) == 0
    record = read_record(tmp_path / "routing-test_zh.json")
    assert list(record.parts) == ["zh"] and record.metrics["language guessed right"].value == 100
