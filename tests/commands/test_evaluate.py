"""``mhmoe evaluate`` on models of one text and of images; for languages see tasks/test_multilingual_training.py."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from console import evaluate, evaluated, run_console
from fairseq.data.indexed_dataset import MMapIndexedDataset, MMapIndexedDatasetBuilder
from images_and_words import training_words, write_images_and_words, write_tokenizer

from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.data.identity import identify_data
from mhmoe_fairseq.evaluation.records import read_record
from mhmoe_fairseq.models.precision import resolve


def test_one_text_has_a_total_only_which_is_fairseqs(runs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = runs.copy("mhmoe", tmp_path / "mhmoe")
    assert main(["evaluate", str(run / "checkpoint_last.pt"), "--data", str(runs.data)]) == 0
    record = read_record(run / "record-test.json")
    printed = evaluated((runs.mhmoe / "eval-test.log").read_text())
    loss, perplexity = (record.metrics[name] for name in ("loss", "perplexity"))
    assert (f"{loss.value:.4f}", f"{perplexity.value:.2f}", loss.count) == (
        f"{printed.loss:.4f}", f"{printed.perplexity:.2f}", printed.tokens,
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert shown.count("\n| ") == 1  # below the header
    assert "| perplexity | loss (bits/token) |" in shown and f"written: {run / 'record-test.json'}" in shown


def test_domains_are_those_that_fairseq_evaluates_one_by_one(runs, tmp_path: Path, capsys) -> None:
    lines = MMapIndexedDataset(str(runs.data / "test"))
    for name, part in (("test", range(len(lines))), ("test_first", range(9)), ("test_second", range(9, len(lines)))):
        builder = MMapIndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=np.uint16)
        for index in part:
            builder.add_item(lines[index])
        builder.finalize(str(tmp_path / f"{name}.idx"))
    shutil.copy(runs.data / "dict.txt", tmp_path)
    checkpoint = runs.copy("mhmoe", tmp_path / "mhmoe") / "checkpoint_last.pt"
    assert main(["evaluate", str(checkpoint), "--data", str(tmp_path)]) == 0
    record, shown = read_record(tmp_path / "mhmoe" / "record-test.json"), capsys.readouterr().out
    assert list(record.parts) == record.experts.parts == ["first", "second"] and "| domain " in shown
    for domain, metrics in record.parts.items():
        printed = evaluated(evaluate(tmp_path, checkpoint, "--gen-subset", f"test_{domain}"))
        loss, perplexity = metrics["loss"], metrics["perplexity"]
        assert (f"{loss.value:.4f}", f"{perplexity.value:.2f}", loss.count) == (
            f"{printed.loss:.4f}", f"{printed.perplexity:.2f}", printed.tokens,
        )  # fmt: skip
    assert record.metrics["loss"].count == lines.sizes.sum()


def test_a_record_tells_what_was_measured_on_what_with_what(runs, tmp_path: Path, capsys) -> None:
    run = runs.copy("mhmoe", tmp_path / "mhmoe")
    assert main(["evaluate", str(run), "--split", "valid", "--record", str(tmp_path / "here.json"), "--cpu"]) == 0
    record = read_record(tmp_path / "here.json")
    both = [str(run), "--split", "test", "--split", "valid", "--cpu"]  # one after the other, as if alone
    assert main(["evaluate", *both]) == 0
    tested = read_record(run / "record-test.json")
    assert tested.split == "test" and "evaluated before" not in capsys.readouterr().out
    dates = [tested.provenance["date"]]
    for _ in range(2):
        assert main(["evaluate", *both]) == 0
        assert capsys.readouterr().out.count(f"evaluated before: {', '.join(dates)}: a test set is for once") == 1
        tested = read_record(run / "record-test.json")
        assert tested.provenance["earlier"] == dates
        dates.append(tested.provenance["date"])
    again = read_record(run / "record-valid.json")
    assert (again.metrics, again.experts, again.data) == (record.metrics, record.experts, record.data)
    assert main(["evaluate", *both, "--record", str(tmp_path / "both.json")]) == 2
    assert (record.what, record.split, record.parts) == ("perplexity", "valid", {})
    counts, weights = record.model["counts"], torch.load(run / "checkpoint_best.pt", weights_only=True)["model"]
    moe = [name for name in weights if ".experts." in name]
    assert counts["expert"] == sum(weights[name].numel() for name in moe) < counts["parameters"]
    assert (counts["heads"], counts["experts"], counts["top_k"]) == (2, 8, 2)
    assert record.model["arch"] == "mhmoe_lm_tiny" and record.model["settings"]["optimization"]["max_update"] == 8
    assert record.checkpoint["updates"] == 8 and record.checkpoint["path"].endswith("checkpoint_best.pt")
    assert record.data["digest"] == identify_data(runs.data).digest and record.data["kind"] == "english"
    assert record.provenance["precision"] == "fp32" and record.provenance["device"] == "cpu"
    tokens = record.metrics["loss"].count
    assert all(sum(row.loads) == tokens * 2 * 2 for row in record.experts.layers) and record.experts.parts == []


@pytest.mark.parametrize("run", ["dense", "mhmoe"])
def test_in_another_precision_perplexity_does_not_depend_on_the_batch(runs, tmp_path: Path, run: str) -> None:
    checkpoint, found = getattr(runs, run) / "checkpoint_last.pt", {}
    for precision, size in (("fp32", 1), ("fp32", 32), ("bf16", 1), ("bf16", 32), ("auto", 32)):
        flags = ["--precision", precision, "--batch-size", str(size), "--record", str(tmp_path / "record.json")]
        assert main(["evaluate", str(checkpoint), "--data", str(runs.data), "--cpu", *flags]) == 0
        record = read_record(tmp_path / "record.json")
        assert record.provenance["precision"] == resolve(precision, "cpu")
        found[precision, size] = record.main.value
    assert found["auto", 32] == found[resolve("auto", "cpu"), 32] and found["bf16", 1] != found["fp32", 1]
    assert f"{found['fp32', 1]:.2f}" == f"{found['fp32', 32]:.2f}"
    assert found["bf16", 1] == pytest.approx(found["bf16", 32], rel=1e-3)
    assert found["bf16", 32] == pytest.approx(found["fp32", 32], rel=1e-2)
    overridden = ["--batch-size", 32, "--model-overrides", "{'mhmoe_precision': 'bf16'}"]
    assert evaluated(evaluate(runs.data, checkpoint, *overridden)).perplexity == round(found["bf16", 32], 2)


def test_languages_of_a_model_of_one_text(runs, capsys: pytest.CaptureFixture) -> None:
    words = [runs.dense / "checkpoint_last.pt", "--data", runs.data, "--langs", "de"]
    assert main(["evaluate", *map(str, words)]) == 2
    assert "--langs: has no meaning for a checkpoint of task mhmoe_language_modeling" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--tokens-per-sample", 1024), r"blocks are longer than the model's \d+ positions .* give --tokens"),
        (("--context-window", 4096), r"--tokens-per-sample \(-\d+\) must be at least 1; .* --context-window"),
    ],
)
def test_no_figure_comes_of_an_empty_set(runs, flags: tuple, message: str) -> None:
    """1024 is fairseq's block length where none is given."""
    log = evaluate(runs.data, runs.dense / "checkpoint_last.pt", *flags, check=False)
    assert re.search(f"UserError: .*{message}", log) and "Perplexity" not in log


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
