"""Training and evaluation in several languages through fairseq's commands and ``mhmoe evaluate``."""

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest
import torch
from console import evaluate, evaluated, evaluation_record, train
from multilingual_data import LANGUAGES, write_languages
from workers import TRAIN_FLAGS, Workers

from mhmoe_fairseq.analysis.reports.runs import read_training_log
from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.evaluation.records import Metric, Record

TASK = ("--task", "mhmoe_multilingual_language_modeling")
SAMPLED = (*TASK, "--multilang-sampling-alpha", 0.5)
MODEL = (
    "--decoder-embed-dim", 32, "--decoder-attention-heads", 2, "--moe-expert-count", 4, "--moe-ffn-dim", 16,
    "--mhmoe-heads-number", 2, "--moe-top-k", 2, "--batch-size", 64,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_languages(tmp_path_factory.mktemp("languages") / "data")


def train_languages(data: Path, run: Path, *flags: object, updates: int) -> list[dict]:
    """Train; what each update logged."""
    log = ["--log-format", "json", "--log-interval", 1, "--log-file", run / "train.log"]
    run.mkdir(exist_ok=True)
    train(data, run, "mhmoe_lm_tiny", *SAMPLED, *MODEL, *log, *flags, max_update=updates)
    return read_training_log(run / "train.log").inner


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of 15 updates, and a little more."""
    folder = tmp_path_factory.mktemp("run") / "mhmoe"
    flags = ["--valid-subset", "valid,valid_de", "--validate-interval", 100, "--save-interval-updates", 20]
    if importlib.util.find_spec("tensorboardX"):
        flags += ["--tensorboard-logdir", folder / "board"]
    train_languages(data, folder, *flags, updates=32)
    return folder


def record(data: Path, run: Path, split: str, *flags: object) -> Record:
    return evaluation_record(run.parent, run / "checkpoint_last.pt", "--data", data, "--split", split, *flags)


def fairseq_score(data: Path, run: Path, split: str, *flags: object):
    flags = (*TASK, "--gen-subset", split, "--batch-size", 32, *flags)
    return evaluated(evaluate(data, run / "checkpoint_last.pt", *flags))


# ---------------------------------------------------------------------- the training log


def test_every_language_is_in_the_training_log(data: Path, run: Path) -> None:
    lines = (run / "train.log").read_text().splitlines()
    records = [json.loads(line) for line in lines if line.startswith('{"epoch"')]
    together = [record for record in records if "valid_loss" in record][-1]
    alone = [record for record in records if "valid_de_loss" in record][-1]
    assert together["valid_ppl_de"] == alone["valid_de_ppl"]
    assert together["valid_bpc_de"] == alone["valid_de_bpc"]
    tokens = {language: token_count(data, language, "valid") for language in LANGUAGES}
    bits = sum(math.log2(float(together[f"valid_ppl_{language}"])) * tokens[language] for language in LANGUAGES)
    assert float(together["valid_loss"]) == pytest.approx(bits / sum(tokens.values()), abs=2e-3)
    assert float(together["valid_bpc_zh"]) == pytest.approx(math.log2(float(together["valid_ppl_zh"])), abs=2e-3)
    assert 0 < float(together["valid_moe_active"]) <= 1  # routing is logged as ever
    assert not any(key.startswith(("ppl_", "bpc")) for record in records for key in record)


@pytest.mark.skipif(importlib.util.find_spec("tensorboardX") is None, reason="tensorboardX is an optional package")
def test_every_language_is_in_tensorboard(run: Path) -> None:
    (events,) = (run / "board" / "valid").glob("events*")
    content = events.read_bytes()
    for language in LANGUAGES:
        assert f"ppl_{language}".encode() in content and f"bpc_{language}".encode() in content


def token_count(data: Path, language: str, split: str) -> int:
    text = (data / "text" / language / f"{split}.txt").read_text(encoding="utf-8")
    return len(text)  # the words are characters, and the end of a line is one


# ---------------------------------------------------------------------- evaluation


def test_one_launch_evaluates_every_language_as_fairseq_does(data: Path, run: Path, capsys) -> None:
    found = record(data, run, "test")
    table = capsys.readouterr().out
    assert "| language " in table
    for split, metrics in {"test_de": found.parts["de"], "test": found.metrics}.items():
        printed = fairseq_score(data, run, split)
        assert f"{metrics['loss'].value:.4f}" == f"{printed.loss:.4f}"
        assert f"{metrics['perplexity'].value:.2f}" == f"{printed.perplexity:.2f}"
        assert metrics["loss"].count == printed.tokens
        assert f"| {printed.loss:.4f} |" in re.sub(" +", " ", table)
    assert list(found.parts) == found.experts.parts == LANGUAGES
    for language, metrics in found.parts.items():
        assert metrics["loss"].count == token_count(data, language, "test")
        assert metrics["bits/character"].value == pytest.approx(metrics["loss"].value)  # a token is a character here
        size = len((data / "text" / language / "test.txt").read_bytes())
        bits = metrics["loss"].value * metrics["loss"].count
        assert metrics["bits/byte"] == Metric(pytest.approx(bits / size), "bits/byte", count=size)
    losses = [metrics["loss"] for metrics in found.parts.values()]
    weighted = sum(loss.value * loss.count for loss in losses) / sum(loss.count for loss in losses)
    assert found.metrics["loss"].value == pytest.approx(weighted)


def test_a_subset_of_the_languages_is_evaluated_with_the_same_vocabulary(data: Path, run: Path) -> None:
    whole, subset = record(data, run, "test"), record(data, run, "test", "--langs", "zh,el")
    assert subset.parts == {language: whole.parts[language] for language in ("el", "zh")}
    assert subset.main.count == sum(token_count(data, language, "test") for language in ("el", "zh"))
    assert fairseq_score(data, run, "test", "--langs", "el,zh").tokens == subset.main.count


def test_one_language_is_evaluated_alone_and_without_a_manifest(data: Path, run: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in data.iterdir():
        if path.name != "manifest.json":
            (bare / path.name).symlink_to(path)
    found, whole = record(bare, run, "test_en", "--batch-size", 5), record(data, run, "test")
    assert list(found.parts) == ["en"] and "bits/character" not in found.metrics
    assert found.metrics["loss"].value == pytest.approx(whole.parts["en"]["loss"].value, abs=1e-5)
    assert found.data["digest"] == whole.data["digest"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--langs", "de,sw"], "--langs (de,sw): "),
        (["--split", "test_sw"], "no split 'test_sw'"),
        (["--batch-size", "0"], "--batch-size (0) must be at least 1"),
    ],
)
def test_bad_input_of_evaluate_is_one_line(data: Path, run: Path, capsys, flags: list[str], message: str) -> None:
    assert main(["evaluate", str(run / "checkpoint_last.pt"), "--data", str(data), *flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("mhmoe evaluate: error: ") and message in error


# ---------------------------------------------------------------------- resuming and several ranks


def test_resuming_in_the_second_epoch_is_exact(data: Path, run: Path, tmp_path: Path) -> None:
    straight = read_training_log(run / "train.log").inner
    (checkpoint,) = run.glob("checkpoint_*_20.pt")
    assert checkpoint.name == "checkpoint_2_20.pt"
    flags = ["--disable-validation", "--restore-file", checkpoint]
    resumed = train_languages(data, tmp_path / "resumed", *flags, updates=32)
    names = ("num_updates", "loss", "gate_loss", "gnorm", "wpb")
    assert [tuple(update[name] for name in names) for update in resumed] == [
        tuple(update[name] for name in names) for update in straight[20:]
    ]
    assert len(resumed) == 12
    one, other = (
        torch.load(folder / "checkpoint_last.pt", weights_only=True)["model"] for folder in (run, tmp_path / "resumed")
    )
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_two_ranks_with_spread_experts_train_as_one_process(data: Path, tmp_path: Path) -> None:
    updates = {}
    for ranks in (1, 2):
        words = [
            data, *TRAIN_FLAGS, *SAMPLED, "--arch", "mhmoe_lm_tiny", "--decoder-layers", 2, *MODEL, "--batch-size", 16,
            "--tokens-per-sample", 32, "--optimizer", "mhmoe_adam", "--lr", 0.003, "--clip-norm", 1, "--max-update", 4,
            "--update-freq", 2 // ranks, "--save-dir", tmp_path / str(ranks),
        ]  # fmt: skip
        log = Workers(ranks).fairseq("fairseq-train", *words, timeout=300)[0]
        updates[ranks] = [json.loads(line) for line in re.findall(r"train_inner[ |:]+(\{.*\})", log)]
        valid = json.loads(re.findall(r"[|:] ?valid[ |:]+(\{.*\})", log)[-1])
        updates[ranks].append({key: valid[key] for key in valid if key.startswith(("valid_ppl", "valid_bpc"))})
    names = ("num_updates", "loss", "gate_loss", "gnorm", "wpb")
    one, two = ([tuple(update[name] for name in names) for update in updates[ranks][:-1]] for ranks in (1, 2))
    assert one == two and len(one) == 4
    assert updates[1][-1] == updates[2][-1]
    assert {f"valid_ppl_{language}" for language in LANGUAGES} < set(updates[2][-1])


def test_a_model_with_language_tokens_is_trained_and_evaluated(data: Path, tmp_path: Path) -> None:
    train_languages(data, tmp_path / "run", "--mhmoe-language-token", "--disable-validation", updates=1)
    assert record(data, tmp_path / "run", "test").main.count == sum(
        token_count(data, language, "test") for language in LANGUAGES
    )
    with pytest.raises(AssertionError, match="the model was trained with --mhmoe-language-token: add the flag"):
        fairseq_score(data, tmp_path / "run", "test")
