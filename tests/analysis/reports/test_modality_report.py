"""``mhmoe evaluate`` and ``mhmoe report`` on models of images and text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from console import run_console
from images_and_words import training_words, write_images_and_words, write_tokenizer

from mhmoe_fairseq.analysis.reports.runs import read_run
from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.common.files import sha256_of
from mhmoe_fairseq.data.identity import identify_data, identify_manifest
from mhmoe_fairseq.evaluation.modality_scores import ModalityScores, PartScore, guess, read_modality_scores

PARTS = ("patches of images", "words of texts", "patches of pairs", "words of pairs", "all masked positions")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images_and_words(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MODEL/seed-N of two models, evaluated on both splits; the second model's weights are the first's."""
    root = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        run = root / "mhmoe" / f"seed-{seed}"
        run.mkdir(parents=True)
        log = ["--log-file", run / "train.log", "--seed", seed, "--validate-interval-updates", 2]
        run_console("fairseq-train", *training_words(data, run, *log, updates=4), cwd=data)
        for split in ("valid", "test"):
            words = [run / "checkpoint_last.pt", "--data", data, "--split", split, "--json", run / f"eval-{split}.json"]
            assert main(["evaluate", *map(str, words)]) == 0
    shutil.copytree(root / "mhmoe" / "seed-1", root / "other" / "seed-1")
    return root


def report(*words: object) -> int:
    return main(["report", *map(str, words)])


def test_seeds_of_two_models(data: Path, runs: Path, capsys: pytest.CaptureFixture) -> None:
    out = runs / "report.md"
    words = [runs / "mhmoe", runs / "other", "--aggregate", "--reference", "other", "--data", data, "--out", out]
    assert report(*words) == 0
    text = out.read_text()
    scores = [json.loads((runs / "mhmoe" / f"seed-{seed}" / "eval-test.json").read_text()) for seed in (1, 2)]
    mean = sum(score["modalities"]["pair_text"]["perplexity"] for score in scores) / 2
    (row,) = [line for line in text.splitlines() if line.startswith("| words of pairs")][:1]
    assert f"{mean:.2f} ± " in row and f"{scores[0]['modalities']['pair_text']['perplexity']:.2f} |" in row
    assert all(text.count(f"\n| {part} ") == 2 for part in PARTS)  # of test and valid
    assert "paper, masked multimodal" in text and "10.87" in text and "bits/byte" not in text
    assert "Mean ± sample standard deviation" in text
    for figure in ("masked-perplexity-test.png", "masked-pair-text.png", "test-perplexity.png"):
        assert (runs / "report-figures" / figure).stat().st_size > 1000
        assert f"report-figures/{figure}" in text
    assert "words of pairs" in capsys.readouterr().out


def test_runs_side_by_side(data: Path, runs: Path) -> None:
    out = runs / "side.md"
    assert report(runs / "mhmoe" / "seed-1", runs / "mhmoe" / "seed-2", "--data", data, "--out", out) == 0
    text = out.read_text()
    assert text.startswith("# Masked multimodal models side by side") and "seed-2, ppl" in text
    row = next(line for line in text.splitlines() if line.startswith("| seed-1 "))
    assert row.count(" % |") == 2  # active and effective experts, from the evaluation
    assert "--seed" in text.split("Settings that differ")[1]
    assert (runs / "side-figures" / "expert-activation.png").is_file()


def test_another_tokenizer_does_not_compare(
    data: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_tokenizer(tmp_path / "other.pt", data, seed=2)
    run = tmp_path / "run"
    run.mkdir()
    flags = ["--visual-tokenizer", tmp_path / "other.pt", "--log-file", run / "train.log", "--disable-validation"]
    run_console("fairseq-train", *training_words(data, run, *flags, updates=1), cwd=data)
    assert report(runs / "mhmoe" / "seed-1", run, "--data", data, "--out", tmp_path / "out.md", "--no-plots") == 2
    assert "was trained with another visual tokenizer than" in capsys.readouterr().err


def test_the_tokenizer_of_the_training_is_needed(
    data: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["evaluate", str(runs / "mhmoe" / "seed-1" / "checkpoint_last.pt"), "--split", "valid"]
    moved = shutil.copytree(data, tmp_path / "data")
    (moved / "visual_tokenizer.pt").rename(tmp_path / "kept.pt")
    assert main([*words, "--data", str(moved)]) == 2
    assert "visual_tokenizer.pt: no such file" in capsys.readouterr().err
    assert main([*words, "--data", str(moved), "--visual-tokenizer", str(tmp_path / "kept.pt")]) == 0
    write_tokenizer(tmp_path / "other.pt", data, seed=2)
    assert main([*words, "--data", str(data), "--visual-tokenizer", str(tmp_path / "other.pt")]) == 2
    assert "is not the one that the checkpoint was trained with" in capsys.readouterr().err


def test_other_data_do_not_compare(data: Path, runs: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(data, tmp_path / "data")
    with open(changed / "image.train.jsonl", "a") as file:
        file.write('{"image_path": "images/train-0.png"}\n')
    assert identify_data(changed).digest != identify_data(data).digest
    assert report(runs / "mhmoe" / "seed-1", "--data", changed, "--no-plots", "--out", tmp_path / "out.md") == 2


def test_a_folder_and_its_manifest_are_one_identity(data: Path, tmp_path: Path) -> None:
    found = identify_data(data)
    assert (found.has_images, found.languages) == (True, ())
    files = [*data.glob("*.jsonl"), *data.glob("text/*"), data / "dict.txt"]
    listed = {file.relative_to(data).as_posix(): {"sha256": sha256_of(file)} for file in files}
    manifest = {"kind": "image-text", "source": {"name": "squares"}, "files": listed}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert identify_manifest(tmp_path / "manifest.json").digest == found.digest


@pytest.mark.slow
def test_a_model_of_texts_only_has_one_part(data: Path, tmp_path: Path) -> None:
    flags = ["--modalities", "text", "--log-file", tmp_path / "train.log", "--disable-validation"]
    run_console("fairseq-train", *training_words(data, tmp_path, *flags, updates=1), cwd=data)
    file = tmp_path / "eval-test.json"
    assert main(["evaluate", str(tmp_path / "checkpoint_last.pt"), "--data", str(data), "--json", str(file)]) == 0
    scores, _ = read_modality_scores(file)
    assert list(scores.parts) == ["text"] and scores.total == scores.parts["text"]
    assert read_run(tmp_path).modalities["test"] == scores


def test_all_positions_together_are_weighted_by_their_number() -> None:
    scores = ModalityScores({"image": PartScore(30, 2.0, 0.5), "text": PartScore(10, 6.0, 0.1)}, {})
    assert (scores.total.targets, scores.total.loss, scores.total.accuracy) == (40, 3.0, pytest.approx(0.4))
    assert scores.total.perplexity == 8.0


def test_a_guess_without_context_is_as_good_as_the_symbols_are_uneven() -> None:
    assert guess([5, 5, 5, 5]) == PartScore(20, 2.0, 0.25)
    assert guess([7]) == PartScore(7, 0.0, 1.0)
    assert guess([2, 1, 1]).loss == 1.5
