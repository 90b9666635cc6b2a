"""``mhmoe evaluate`` on models of images and text."""

import shutil
from pathlib import Path

import pytest
from console import run_console
from images_and_words import training_words, write_images_and_words, write_tokenizer

from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.evaluation.records import read_record


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images_and_words(tmp_path_factory.mktemp("images") / "data")


def test_the_tokenizer_of_the_training_is_needed(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run_console("fairseq-train", *training_words(data, tmp_path / "run", "--disable-validation", updates=1), cwd=data)
    words = ["evaluate", str(tmp_path / "run" / "checkpoint_last.pt"), "--split", "valid"]
    moved = shutil.copytree(data, tmp_path / "data")
    (moved / "visual_tokenizer.pt").rename(tmp_path / "kept.pt")
    assert main([*words, "--data", str(moved)]) == 2
    assert "visual_tokenizer.pt: no such file" in capsys.readouterr().err
    assert main([*words, "--data", str(moved), "--visual-tokenizer", str(tmp_path / "kept.pt")]) == 0
    write_tokenizer(tmp_path / "other.pt", data, seed=2)
    assert main([*words, "--data", str(data), "--visual-tokenizer", str(tmp_path / "other.pt")]) == 2
    assert "is not the one that the checkpoint was trained with" in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_of_texts_only_has_one_part(data: Path, tmp_path: Path) -> None:
    flags = ["--modalities", "text", "--log-file", tmp_path / "train.log", "--disable-validation"]
    run_console("fairseq-train", *training_words(data, tmp_path, *flags, updates=1), cwd=data)
    assert main(["evaluate", str(tmp_path / "checkpoint_last.pt"), "--data", str(data)]) == 0
    record = read_record(tmp_path / "record-test.json")
    assert record.parts == {"text": record.metrics} and record.experts.parts == ["text"]
