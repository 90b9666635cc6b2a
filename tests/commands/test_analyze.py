"""``mhmoe analyze`` against fairseq-eval-lm and against the model's own counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mhmoe_fairseq.analysis.reports.plots import draw_activations
from mhmoe_fairseq.analysis.reports.run_logs import read_evaluation
from mhmoe_fairseq.analysis.routing.activation import Activation
from mhmoe_fairseq.commands.main import main


def analyze(*arguments: object) -> int:
    return main(["analyze", *map(str, arguments)])


def activation(load: list[list[float]], **changes: object) -> Activation:
    fields = {
        "checkpoint_sha256": "0" * 64, "data_digest": "1" * 64, "split": "valid", "tokens": 10, "loss": 5.0,
        "layers": list(range(1, 2 * len(load), 2)), "load": load, "dropped": [0.0] * len(load),
        "entropy": [0.5] * len(load),
    }  # fmt: skip
    return Activation(**{**fields, **changes})


def test_every_subtoken_of_the_split_is_counted_once_per_choice(
    runs, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpoint = runs.mhmoe / "checkpoint_last.pt"
    assert analyze(checkpoint, "--data", runs.data, "--split", "test", "--out", tmp_path) == 0
    record = json.loads((tmp_path / "activation-test.json").read_text())
    evaluation = read_evaluation(runs.mhmoe / "eval-test.log")
    assert record["tokens"] == evaluation.tokens
    assert record["loss"] == pytest.approx(evaluation.loss, abs=1e-3)
    assert record["layers"] == [1]
    heads, top_k = 2, 2
    assert [sum(load) for load in record["load"]] == [evaluation.tokens * heads * top_k]
    assert (tmp_path / "activation-test.png").read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert "active: at least 1.0% of the uniform load" in output and "| mean " in output


def test_the_result_does_not_depend_on_the_batch_size(runs, tmp_path: Path) -> None:
    loads = []
    for size in (1, 7):
        flags = ["--data", runs.data, "--out", tmp_path / str(size), "--batch-size", size, "--no-plots"]
        assert analyze(runs.mhmoe / "checkpoint_last.pt", *flags) == 0
        loads.append(json.loads((tmp_path / str(size) / "activation-valid.json").read_text())["load"])
    assert loads[0] == loads[1]


def test_shares_by_hand() -> None:
    measured = activation([[100.0, 100.0, 0.0, 0.0], [397.0, 1.0, 1.0, 1.0]])
    assert measured.active() == [0.5, 1.0]
    assert measured.active(0.05) == [0.5, 0.25]
    assert measured.effective()[0] == pytest.approx(0.5)
    assert measured.max_over_mean() == [2.0, pytest.approx(3.97)]
    assert activation([[6.0, 2.0]], dropped=[2.0]).overflow() == [0.25]
    shares = torch.tensor([[1.5, 0.5], [0.5, 1.5]], dtype=torch.float64)  # of its own layer's
    assert torch.equal(activation([[6.0, 2.0], [10.0, 30.0]]).relative_load(), shares)


def test_models_with_different_numbers_of_experts_share_a_figure(tmp_path: Path) -> None:
    maps = {"xmoe": activation([[1.0, 3.0]] * 6), "mhmoe": activation([[1.0] * 35] * 6)}
    draw_activations(tmp_path / "map.png", maps)
    assert (tmp_path / "map.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "run, flags, message",
    [
        ("dense", [], "is a dense model"),
        ("mhmoe", ["--split", "holdout"], "holdout.idx is missing"),
        ("mhmoe", ["--threshold", "2"], "--threshold (2) must be at least 0 and at most 1"),
        ("mhmoe", ["--batch-size", "0"], "--batch-size (0) must be at least 1"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    runs, tmp_path: Path, capsys: pytest.CaptureFixture, run: str, flags: list[str], message: str
) -> None:
    checkpoint = getattr(runs, run) / "checkpoint_last.pt"
    assert analyze(checkpoint, "--data", runs.data, "--out", tmp_path, *flags) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("mhmoe analyze: error: ") and message in error[-1]


def test_a_missing_checkpoint_and_a_file_that_is_none(runs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert analyze(tmp_path / "none.pt", "--data", runs.data) == 2
    assert "none.pt) does not exist" in capsys.readouterr().err
    assert analyze(runs.mhmoe / "train.log", "--data", runs.data) == 2
    assert "it is not a file of torch.save" in capsys.readouterr().err


def test_data_with_another_dictionary_are_refused(runs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import shutil

    other = Path(shutil.copytree(runs.data, tmp_path / "other"))
    words = (other / "dict.txt").read_text(encoding="utf-8").splitlines()
    (other / "dict.txt").write_text("\n".join([words[1], words[0], *words[2:]]) + "\n", encoding="utf-8")
    assert analyze(runs.mhmoe / "checkpoint_last.pt", "--data", other, "--out", tmp_path) == 2
    assert "is not this data's dict.txt" in capsys.readouterr().err


def test_a_language_model_has_no_patches(runs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    flags = ["--data", runs.data, "--image", tmp_path / "image.png", "--no-plots"]
    assert main(["diversity", str(runs.mhmoe / "checkpoint_last.pt"), *map(str, flags)]) == 2
    assert "is a language model: it has no image patches" in capsys.readouterr().err
