"""Pre-training on images, texts and pairs through fairseq's commands, and its evaluation."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from console import USER_DIR, run_console
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from images_and_words import SHAPES, training_words, write_images_and_words, write_tokenizer

from mhmoe_fairseq.analysis.reports.runs import TrainingLog, read_training_log
from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.criterions.masked_multimodal import PARTS
from mhmoe_fairseq.evaluation.records import read_record


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images_and_words(tmp_path_factory.mktemp("images") / "data")


def train(data: Path, save_dir: Path, *flags: object, updates: int, check: bool = True) -> str:
    save_dir.mkdir(parents=True, exist_ok=True)
    log = ["--log-file", save_dir / "train.log"]
    return run_console(
        "fairseq-train", *training_words(data, save_dir, *log, *flags, updates=updates), cwd=data, check=check
    )


def saved(save_dir: Path) -> dict[str, Any]:
    return torch.load(save_dir / "checkpoint_last.pt", weights_only=True)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of six updates and a little more, dropout and all."""
    folder = tmp_path_factory.mktemp("run") / "mhmoe"
    flags = ["--dropout", 0.1, "--save-interval-updates", 8, "--keep-interval-updates", 1]
    if importlib.util.find_spec("tensorboardX"):
        flags += ["--tensorboard-logdir", folder / "board"]
    train(data, folder, *flags, updates=14)
    return folder


@pytest.fixture(scope="module")
def log(run: Path) -> TrainingLog:
    return read_training_log(run / "train.log")


# ---------------------------------------------------------------------- the training log


def test_every_part_is_logged_and_learnt(log: TrainingLog) -> None:
    first, last = log.valid[0], log.valid[-1]
    for part in PARTS:
        assert last[f"valid_{part}_ppl"] == pytest.approx(2 ** last[f"valid_{part}_loss"], rel=5e-3)
        assert 0 <= last[f"valid_{part}_accuracy"] <= 100
    mean = sum(last[f"valid_{part}_loss"] for part in PARTS) / 4
    assert last["valid_loss"] == pytest.approx(mean, abs=2e-3)
    assert last["valid_loss"] < first["valid_loss"]
    assert last["valid_ppl"] == pytest.approx(2 ** last["valid_nll_loss"], rel=5e-3)
    assert log.inner[-1]["loss"] < log.inner[0]["loss"]
    assert {"gate_loss", "moe_active", "moe_load_max", "moe_entropy"} <= log.inner[-1].keys()
    assert log.inner[0]["bsz"] == 4


@pytest.mark.skipif(importlib.util.find_spec("tensorboardX") is None, reason="tensorboardX is an optional package")
def test_every_part_is_in_tensorboard(run: Path) -> None:
    (events,) = (run / "board" / "valid").glob("events*")
    content = events.read_bytes()
    for part in PARTS:
        assert f"{part}_ppl".encode() in content and f"{part}_accuracy".encode() in content


# ---------------------------------------------------------------------- resuming


def test_a_run_resumed_within_an_epoch_ends_bit_for_bit_the_same(data: Path, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "resumed"
    folder.mkdir()
    (checkpoint,) = run.glob("checkpoint_2_8.pt")  # two updates into the second epoch
    shutil.copy(checkpoint, folder / "checkpoint_last.pt")
    train(data, folder, "--dropout", 0.1, "--num-workers", 1, updates=14)
    whole, resumed = saved(run), saved(folder)
    assert whole["model"].keys() == resumed["model"].keys()
    assert all(torch.equal(whole["model"][name], resumed["model"][name]) for name in whole["model"])
    moments, again = (state["last_optimizer_state"]["state"] for state in (whole, resumed))
    assert all(torch.equal(moments[key]["exp_avg"], again[key]["exp_avg"]) for key in moments)


def test_a_run_does_not_go_on_with_another_tokenizer(data: Path, run: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "other.pt", data, seed=2)
    shutil.copy(run / "checkpoint_last.pt", tmp_path / "checkpoint_last.pt")
    log = train(data, tmp_path, "--visual-tokenizer", tmp_path / "other.pt", updates=40, check=False)
    assert "is not the one that the checkpoint was trained with: its ids mean other patches" in log
    assert '"update": ' not in log and "train_inner" not in log


# ---------------------------------------------------------------------- evaluation


def test_fairseq_validate_and_mhmoe_evaluate_agree_with_the_training(data: Path, run: Path, log: TrainingLog) -> None:
    words = [data, "--user-dir", USER_DIR, "--task", "mhmoe_masked_multimodal", *SHAPES]
    words += ["--path", run / "checkpoint_last.pt", "--valid-subset", "valid", "--batch-size", 3, "--cpu"]
    printed = run_console("fairseq-validate", *words, "--num-workers", 0, "--log-format", "json", cwd=data)
    (line,) = [line for line in printed.splitlines() if '"valid_ppl"' in line or ('"ppl"' in line and "{" in line)]
    record = json.loads(line[line.index("{") :])
    words = [run / "checkpoint_last.pt", "--data", data, "--split", "valid", "--batch-size", 5]
    assert main(["evaluate", *map(str, words)]) == 0
    found = read_record(run / "record-valid.json")
    last = log.valid[-1]
    for part in PARTS:
        perplexity = found.parts[part]["perplexity"].value
        assert perplexity == pytest.approx(last[f"valid_{part}_ppl"], rel=3e-3)
        assert perplexity == pytest.approx(float(record.get(f"valid_{part}_ppl", record.get(f"{part}_ppl"))), rel=3e-3)
    assert found.main.value == pytest.approx(last["valid_ppl"], rel=3e-3)
    assert found.main.count == sum(metrics["perplexity"].count for metrics in found.parts.values())
    assert 1 < found.parts["image"]["perplexity"].baselines["without context"] < 12
    assert found.experts.parts == ["image", "text", "pair"] and found.data["visual_tokenizer"]
    whole, *parts = found.experts.layers
    assert {row.layer for row in found.experts.layers} == {1} and len(parts) == 3 and len(whole.loads) == 4
    assert [sum(loads) for loads in zip(*(row.loads for row in parts))] == whole.loads


# ---------------------------------------------------------------------- other ways to train


def test_bf16_accumulation_and_fewer_modalities(data: Path, tmp_path: Path) -> None:
    flags = ("--mhmoe-precision", "bf16", "--update-freq", 2, "--modalities", "text,pair", "--disable-validation")
    train(data, tmp_path, *flags, updates=6)
    records = read_training_log(tmp_path / "train.log").inner
    assert len(records) == 6 and records[0]["bsz"] == 8
    assert records[-1]["loss"] < records[0]["loss"]
    assert "pair_image_ppl" in records[-1] and "image_ppl" not in records[-1]


@pytest.mark.slow
def test_a_dense_model_and_mean_over_targets(data: Path, tmp_path: Path) -> None:
    dense = [word for word in training_words(data, tmp_path, updates=4)]
    place = dense.index("--moe-freq")
    dense = dense[:place] + dense[place + 10 :]
    dense[dense.index("mhmoe_beit3_tiny")] = "dense_beit3_tiny"
    words = [*dense, "--log-file", tmp_path / "train.log", "--masked-loss-average", "target", "--no-save"]
    run_console("fairseq-train", *words, cwd=data)
    record = read_training_log(tmp_path / "train.log").inner[-1]
    assert record["loss"] == record["nll_loss"] and "gate_loss" not in record


# ---------------------------------------------------------------------- starting from another checkpoint


@pytest.mark.slow
def test_pre_training_goes_on_at_a_higher_resolution(data: Path, run: Path, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "finer.pt", data, image_size=64)
    start = ("--finetune-from-model", run / "checkpoint_last.pt", "--img-size", 64, "--disable-validation")
    log = train(data, tmp_path, *start, "--visual-tokenizer", tmp_path / "finer.pt", "--no-save", updates=1)
    assert "positions of 4x4 patches are resized to 8x8 (--img-size)" in log
    assert read_training_log(tmp_path / "train.log").inner[0]["bsz"] == 4


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ("--encoder-embed-dim", 48),
            "is of shape .*, this model's of .*: give --arch and the model's flags as in its",
        ),
        (("--moe-freq", 1), "it has no parameter beit3.encoder.layers.0.moe_layer"),
        (("--max-text-length", 20), r"--max-text-length \(20\): the checkpoint has positions for 16 tokens only"),
    ],
)
def test_another_model_is_refused_before_training(
    data: Path, run: Path, tmp_path: Path, flags: tuple, message: str
) -> None:
    task = build_task(data, tmp_path, run / "checkpoint_last.pt", *flags)
    with pytest.raises(UserError, match=f"checkpoint_last.pt: .*{message}"):
        task.build()


def test_another_dictionary_is_refused_before_training(data: Path, run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(data, tmp_path / "data")
    lines = (other / "dict.txt").read_text().splitlines()
    (other / "dict.txt").write_text("\n".join([*lines[1:-1], lines[0], lines[-1]]) + "\n")
    with pytest.raises(UserError, match="its dictionary .19 words, other symbols or another order. is not that of"):
        build_task(other, tmp_path, run / "checkpoint_last.pt").build()


class Setting(NamedTuple):
    """A training as fairseq-train would set it up."""

    task: Any
    model_config: Any

    def build(self) -> Any:
        return self.task.build_model(self.model_config)


def build_task(data: Path, save_dir: Path, start: Path, *flags: object) -> Setting:
    words = training_words(data, save_dir, "--finetune-from-model", start, *flags, updates=1)
    words = [str(word) for word in words]
    config = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), words))
    return Setting(tasks.setup_task(config.task), config.model)
