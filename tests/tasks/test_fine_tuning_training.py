"""Pre-training, fine-tuning and prediction with the commands that users type."""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from beit3_models import FAMILIES
from console import evaluation_record, run_console
from fine_tuning_data import ANSWERS, TASKS, fine_tuning_words, write_fine_tuning_data
from images_and_words import training_words

from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.data.multimodal.index import index_files, read_index, write_index


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fine_tuning_data(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture(scope="module")
def pretrained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    run_console("fairseq-train", *training_words(data, folder, "--disable-validation", updates=2), cwd=data)
    return folder / "checkpoint_last.pt"


def train(task: str, data: Path, save_dir: Path, *flags: object, updates: int, check: bool = True) -> str:
    save_dir.mkdir(exist_ok=True)
    return run_console(
        "fairseq-train", *fine_tuning_words(task, data, save_dir, *flags, updates=updates), cwd=data, check=check
    )


def validations(log: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in re.findall(r"(?:^|[ |:])valid[ |:]+(\{.*\})", log, re.MULTILINE)]


def mhmoe_evaluate(capsys: pytest.CaptureFixture, *words: object, status: int = 0) -> str:
    capsys.readouterr()
    assert main(["evaluate", *map(str, words)]) == status
    output = capsys.readouterr()
    return output.err if status else output.out


@pytest.fixture(scope="module")
def vqa(data: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a training whose layers have their own rates, and its log."""
    folder = tmp_path_factory.mktemp("vqa")
    flags = ("--finetune-from-model", pretrained, "--layer-decay", 0.9, "--head-lr-multiplier", 2, "--lr", 0.003)
    return folder, train("mhmoe_vqa", data, folder, *flags, "--no-flip", updates=36)


def test_questions_are_learnt_and_the_best_score_kept(vqa: tuple[Path, str]) -> None:
    folder, log = vqa
    assert "the checkpoint has no head 'vqa'" in log and "factors of --lr: 0.729 in the embeddings" in log
    scores = [float(figures["valid_vqa_score"]) for figures in validations(log)]
    best = torch.load(folder / "checkpoint_best.pt", weights_only=True)
    assert best["extra_state"]["best"] == max(scores) > 20
    groups = best["last_optimizer_state"]["param_groups"]
    assert sorted(round(group["lr"] / 0.003, 3) for group in groups) == [0.729, 0.81, 0.9, 1.0, 2.0]


def test_a_score_stands_beside_what_needs_no_image(
    vqa: tuple[Path, str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, log = vqa
    record = evaluation_record(tmp_path, folder, "--split", "valid", "--batch-size", 5)
    score = max(float(figures["valid_vqa_score"]) for figures in validations(log))
    assert record.main.value == pytest.approx(score, abs=0.01)
    training, valid = (read_index(data, "vqa", split) for split in ("train", "valid"))
    assert record.main.baselines == {
        "question only": pytest.approx(100 * _mean_score(training, valid, by_text=True)),
        "most frequent answer": pytest.approx(100 * _mean_score(training, valid, by_text=False)),
    }
    shown = re.sub(" +", " ", capsys.readouterr().out)
    assert "| split | scored | accuracy (%) | accuracy, question only | accuracy, most frequent answer |" in shown
    assert f"| valid | 48 | {record.main.value:.2f} ± {record.main.stderr:.2f} |" in shown
    assert (record.what, record.split, record.settings) == ("questions", "valid", {"examples": 48})
    checkpoint = (folder / "checkpoint_best.pt").read_bytes()
    assert record.checkpoint["sha256"] == hashlib.sha256(checkpoint).hexdigest()
    assert record.data["kind"] == "image-text" and sum(record.experts.layers[0].loads) > 0


def _mean_score(training: Any, valid: Any, by_text: bool) -> float:
    """Of answering each question with what the same question, or any one, has most in training; in two loops."""
    total = 0.0
    for record in map(valid.record, range(len(valid))):
        weights = [0.0] * len(ANSWERS)
        for other in map(training.record, range(len(training))):
            if not by_text or other["text_segment"] == record["text_segment"]:
                for label, score in zip(other["labels"], other["scores"]):
                    weights[label] += score
        total += dict(zip(record["labels"], record["scores"])).get(weights.index(max(weights)), 0.0)
    return total / len(valid)


def test_without_labels_there_is_a_submission(vqa: tuple[Path, str], data: Path, tmp_path: Path, capsys) -> None:
    unlabelled = shutil.copytree(data, tmp_path / "data")
    index = read_index(data, "vqa", "test")
    rows = [{**index.record(row), "labels": [], "scores": []} for row in range(len(index))]
    write_index(index_files(unlabelled, "vqa", "test")[0], "vqa", rows)
    (unlabelled / "manifest.json").write_text('{"kind": "image-text", "derived": {"note": "by templates"}}')
    words = (vqa[0], "--data", unlabelled)
    assert "--split test has no labels to score by: give --output FILE" in mhmoe_evaluate(capsys, *words, status=2)
    told = mhmoe_evaluate(capsys, *words, "--output", tmp_path / "submission.json")
    assert told.startswith("These labels are derived from the images' metadata by templates")
    assert "examples: 48\n" in told and "written" not in told and not list(vqa[0].glob("record-test.json"))
    submission = json.loads((tmp_path / "submission.json").read_text())
    assert [answer["question_id"] for answer in submission] == [row["qid"] for row in rows]
    assert {answer["answer"] for answer in submission} <= set(ANSWERS)
    mhmoe_evaluate(capsys, vqa[0], "--output", tmp_path / "labelled.json")
    assert json.loads((tmp_path / "labelled.json").read_text()) == submission


def test_statements(data: Path, pretrained: Path, tmp_path: Path, capsys) -> None:
    flags = ("--finetune-from-model", pretrained, "--lr", 0.003, "--no-flip", "--center-features")
    log = train("mhmoe_nlvr2", data, tmp_path / "run", *flags, updates=20)
    accuracies = [float(figures["valid_accuracy"]) for figures in validations(log)]
    record = evaluation_record(tmp_path, tmp_path / "run", "--split", "valid", "--output", tmp_path / "out.csv")
    index = read_index(data, "nlvr2", "valid")
    assert record.main.count == len(index) and record.main.value == pytest.approx(max(accuracies), abs=0.01)
    assert record.main.baselines["statement only"] == 50.0 and "consistency" in record.metrics
    judged = dict(line.split(",") for line in (tmp_path / "out.csv").read_text().splitlines())
    right = [judged[row["identifier"]] == str(bool(row["label"])) for row in map(index.record, range(len(index)))]
    assert 100 * sum(right) / len(right) == pytest.approx(record.main.value)


@pytest.mark.slow
def test_resuming_keeps_the_layers_rates_and_is_exact(data: Path, pretrained: Path, tmp_path: Path) -> None:
    flags = ("--finetune-from-model", pretrained, "--layer-decay", 0.8, "--dropout", 0.1, "--disable-validation")
    flags += ("--center-features",)
    train("mhmoe_nlvr2", data, tmp_path / "whole", *flags, updates=6)
    for updates in (4, 6):
        train("mhmoe_nlvr2", data, tmp_path / "parts", *flags, updates=updates)
    whole, parts = (
        torch.load(tmp_path / name / "checkpoint_last.pt", weights_only=True) for name in ("whole", "parts")
    )
    assert all(torch.equal(whole["model"][name], value) for name, value in parts["model"].items())
    log = train("mhmoe_nlvr2", data, tmp_path / "parts", *flags[:3], 0.7, *flags[4:], updates=8, check=False)
    assert "--lr-factors, --layer-decay, --head-lr-multiplier: the run that is resumed had the factors" in log


def test_what_cannot_start_is_told_at_once(data: Path, pretrained: Path, tmp_path: Path, capsys) -> None:
    words = ("--finetune-from-model", pretrained, "--layer-decay", 0.8, "--optimizer", "adam")
    log = train("mhmoe_nlvr2", data, tmp_path / "run", *words, updates=1, check=False)
    assert "--layer-decay: --optimizer (adam) must be mhmoe_adam" in log
    words = (pretrained, "--output", tmp_path / "out")
    assert "--output: has no meaning for a checkpoint of task mhmoe_masked_multimodal" in mhmoe_evaluate(
        capsys, *words, status=2
    )


@pytest.mark.slow
@pytest.mark.parametrize("task", ["mhmoe_image_classification", "mhmoe_retrieval"])
def test_the_other_tasks_learn(task: str, data: Path, pretrained: Path, tmp_path: Path, capsys) -> None:
    flags = ("--finetune-from-model", pretrained, "--lr", 0.003, "--no-flip", "--label-smoothing", 0)
    flags = flags if task == "mhmoe_image_classification" else flags[:-2]
    log = train(task, data, tmp_path / "run", *flags, updates=120)
    best = max(float(figures[f"valid_{TASKS[task]}"]) for figures in validations(log))
    record = evaluation_record(tmp_path, tmp_path / "run", "--split", "valid")
    assert record.main.value == pytest.approx(best, abs=0.01) and best > (35 if "top-1" in record.metrics else 45)


@pytest.mark.slow
def test_statements_are_learnt(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Words have to be compared with images: for the first 200 updates nothing seems to happen."""
    flags = ("--lr", 0.001, "--warmup-updates", 50, "--no-flip")
    train("mhmoe_nlvr2", data, tmp_path / "run", *flags, updates=400)
    assert evaluation_record(tmp_path, tmp_path / "run", "--split", "valid").main.value > 65


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_questions(family: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = fine_tuning_words("mhmoe_vqa", data, tmp_path, "--lr", 0.003, "--no-flip", updates=80)
    arch = ("--arch", f"{family}_beit3_tiny")
    run_console("fairseq-train", *without_flags(words, *_FOREIGN[family]), *arch, cwd=data)
    accuracy = evaluation_record(tmp_path, tmp_path, "--split", "valid").main
    assert accuracy.value > accuracy.baselines["question only"] + 10


_EXPERTS = ("--moe-freq", "--moe-expert-count", "--moe-ffn-dim", "--moe-top-k")
_FOREIGN = {
    "dense": ("--mhmoe-heads-number", *_EXPERTS),
    "smoe": ("--mhmoe-heads-number",),
    "xmoe": ("--mhmoe-heads-number",),
    "mhmoe": (),
}


def without_flags(words: list[object], *flags: str) -> list[object]:
    """The words without some flags, which have one value each."""
    dropped = {place for place, word in enumerate(words) if word in flags}
    return [word for place, word in enumerate(words) if place not in dropped and place - 1 not in dropped]


@pytest.mark.slow
def test_a_higher_resolution_than_in_pre_training(data: Path, pretrained: Path, tmp_path: Path, capsys) -> None:
    flags = ("--finetune-from-model", pretrained, "--img-size", 48)
    log = train("mhmoe_vqa", data, tmp_path / "run", *flags, updates=4)
    assert "positions of 4x4 patches are resized to 6x6" in log
    assert evaluation_record(tmp_path, tmp_path / "run").main.count == 48


@pytest.mark.slow
@pytest.mark.parametrize("task", ["mhmoe_vqa", "mhmoe_retrieval"])
def test_two_ranks_that_share_the_experts_and_have_unequal_batches(
    task: str, data: Path, pretrained: Path, tmp_path: Path, workers2: Any, capsys: pytest.CaptureFixture
) -> None:
    """An odd number of batches, in training and in validation: one rank repeats a batch, which must not count."""
    rows = 96 if task == "mhmoe_retrieval" else 192
    flags = ("--finetune-from-model", pretrained, "--layer-decay", 0.9, "--lr", 0.003, "--batch-size", rows // 5 + 1)
    words = fine_tuning_words(task, data, tmp_path / "run", *flags, "--batch-size-valid", 9, updates=9)
    log = workers2.fairseq("fairseq-train", *words)[0]
    assert "2 of 2 processes share the experts of a layer" in log
    best = max(float(figures[f"valid_{TASKS[task]}"]) for figures in validations(log))
    record = evaluation_record(tmp_path, tmp_path / "run", "--split", "valid")
    assert record.main.value == pytest.approx(best, abs=0.01)
    workers2.fairseq("fairseq-train", *words[:-2], "--max-update", 12)
