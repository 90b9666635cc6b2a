"""``mhmoe analyze`` on models of text, against fairseq-eval-lm and against the model's own counts."""

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from console import evaluated, train
from multilingual_data import LANGUAGES, write_languages
from PIL import Image

from mhmoe_fairseq.analysis.reports.plots import draw_loads, relative_load
from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.evaluation.records import read_record, write_record


def analyze(*arguments: object) -> int:
    return main(["analyze", *map(str, arguments)])


def test_every_subtoken_of_the_split_is_counted_once_per_choice(
    runs, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpoint = runs.mhmoe / "checkpoint_last.pt"
    assert analyze(checkpoint, "--data", runs.data, "--split", "test", "--out", tmp_path) == 0
    record = read_record(tmp_path / "routing-test.json")
    tokens, bits, _ = evaluated((runs.mhmoe / "eval-test.log").read_text())
    loss = record.metrics["loss"]
    assert (record.what, loss.count, loss.value) == ("routing", tokens, pytest.approx(bits, abs=1e-3))
    heads, top_k = 2, 2
    assert [(row.layer, sum(row.loads)) for row in record.experts.layers] == [(1, tokens * heads * top_k)]
    assert (tmp_path / "routing-test.png").read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert f"test: {tokens:,} tokens, {loss.value:.4f} bits/token, " in output and "active: at least 1.0% of" in output
    assert "| mean " in output and "load in common" not in output


def test_what_was_counted_is_not_counted_again(runs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = runs.copy("mhmoe", tmp_path / "mhmoe")
    words = [run / "checkpoint_last.pt", "--data", runs.data, "--no-plots"]
    assert analyze(*words, "--batch-size", 1) == 0
    record = read_record(run / "routing-valid.json")
    (run / "routing-valid.json").unlink()
    assert analyze(*words, "--batch-size", 7) == 0
    again = read_record(run / "routing-valid.json")
    assert [row.loads for row in again.experts.layers] == [row.loads for row in record.experts.layers]
    assert capsys.readouterr().out.count("measuring") == 2
    assert analyze(*words) == 0
    (run / "routing-valid.json").unlink()
    write_record(run / "record-valid.json", dataclasses.replace(record, what="perplexity", settings={"kept": True}))
    assert analyze(*words) == 0
    assert "measuring" not in capsys.readouterr().out
    assert read_record(run / "routing-valid.json").settings == {"kept": True}
    assert analyze(*words, "--precision", "bf16", "--cpu") == 0  # what is kept was measured in another
    assert "measuring" in capsys.readouterr().out
    assert read_record(run / "routing-valid.json").provenance["precision"] == "bf16"
    shutil.copy(runs.dense / "checkpoint_last.pt", run)
    assert analyze(*words) == 2
    assert "is a dense model: it has no experts to measure" in capsys.readouterr().err


def test_models_with_different_numbers_of_experts_share_a_plot(tmp_path: Path) -> None:
    rows = [str(layer) for layer in range(6)]
    assert relative_load([[6.0, 2.0], [10.0, 30.0]]).tolist() == [[1.5, 0.5], [0.5, 1.5]]  # of its own layer's
    maps = {"xmoe": dict.fromkeys(rows, [1.0, 3.0]), "mhmoe": dict.fromkeys(rows, [1.0] * 35)}
    draw_loads(tmp_path / "map.png", maps, "", "layer")
    assert (tmp_path / "map.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--split", "holdout"], "holdout.idx is missing"),
        (["--threshold", "2"], "--threshold (2) must be in [0, 1]"),
        (["--batch-size", "0"], "--batch-size (0) must be at least 1"),
        (["--images", "3"], "--images needs --diversity"),
        (["--words", "a text"], "--words needs --view"),
        (["--diversity", "--threshold", "0.1"], "--threshold has no meaning with --diversity"),
        (["--diversity", "--image", "IMAGE"], "is a language model: it has no image patches"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    runs, tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], message: str
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    flags = [str(tmp_path / "image.png") if flag == "IMAGE" else flag for flag in flags]
    words = ["--data", runs.data, "--out", tmp_path, "--no-plots", *flags]
    assert analyze(runs.mhmoe / "checkpoint_last.pt", *words) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("mhmoe analyze: error: ") and message in error[-1]


def test_a_missing_checkpoint_and_a_file_that_is_none(runs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert analyze(tmp_path / "none.pt", "--data", runs.data) == 2
    assert "none.pt) does not exist" in capsys.readouterr().err
    assert analyze(runs.mhmoe / "train.log", "--data", runs.data) == 2
    assert "it is not a file of torch.save" in capsys.readouterr().err
    assert analyze(*2 * [runs.mhmoe / "checkpoint_last.pt"], "--data", runs.data) == 2
    assert "several checkpoints need --diversity or --polysemy" in capsys.readouterr().err


def test_data_with_another_dictionary_are_refused(runs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    other = Path(shutil.copytree(runs.data, tmp_path / "other"))
    words = (other / "dict.txt").read_text(encoding="utf-8").splitlines()
    (other / "dict.txt").write_text("\n".join([words[1], words[0], *words[2:]]) + "\n", encoding="utf-8")
    assert analyze(runs.mhmoe / "checkpoint_last.pt", "--data", other, "--out", tmp_path) == 2
    assert "is not this data's dict.txt" in capsys.readouterr().err


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
    assert 0 <= record.metrics["part guessed right"].value <= 100
    tokens = np.array([record.parts[language]["loss"].count for language in LANGUAGES])
    pieces = np.minimum(np.ceil(tokens / 24), 100).astype(int) // 2
    assert [[sum(row) for row in guesses] for guesses in record.settings["guesses"]] == 2 * [pieces.tolist()]
    for name in ("routing-test.png", "routing-test-load.png", "routing-test-overlap.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "most often taken for" in output and "chance is 25.0 %" in output


def test_a_record_of_some_languages_is_not_taken_for_the_split(data: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    checkpoint = str(tmp_path / "run" / "checkpoint_last.pt")
    words = ["--data", str(data), "--split", "test"]
    assert main(["evaluate", checkpoint, *words, "--langs", LANGUAGES[0]]) == 0
    assert list(read_record(tmp_path / "run" / "record-test.json").parts) == LANGUAGES[:1]
    assert main(["analyze", checkpoint, *words, "--no-plots"]) == 0
    record = read_record(tmp_path / "run" / "routing-test.json")
    assert list(record.parts) == LANGUAGES and record.settings["guesses"]


def test_analysis_of_one_language(data: Path, run: Path, tmp_path: Path) -> None:
    words = ["--data", data, "--split", "test_zh", "--out", tmp_path]
    assert main(["analyze", str(run / "checkpoint_last.pt"), *map(str, words)]) == 0
    record = read_record(tmp_path / "routing-test_zh.json")
    assert list(record.parts) == ["zh"] and record.metrics["part guessed right"].value == 100
