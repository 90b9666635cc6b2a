"""``mhmoe report`` on really trained runs."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest

from mhmoe_fairseq.analysis.reports.run_logs import read_evaluation
from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.data.identity import identify_data

PNG = b"\x89PNG"


def report(*arguments: object) -> int:
    return main(["report", *map(str, arguments)])


def row_of(text: str, name: str) -> dict[str, str]:
    """A table row as column -> cell."""
    tables = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    lines = [[cell.strip() for cell in cells] for cells in tables]
    (row,) = [cells for cells in lines if cells[0] == name and len(cells) > 5]
    return dict(zip(lines[0], row))


def error_of(capsys: pytest.CaptureFixture) -> str:
    error = capsys.readouterr().err
    assert error.startswith("mhmoe report: error: ") and error.count("\n") == 1
    return error


def test_the_report_has_every_figure_of_every_run(runs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out" / "report.md"
    assert report(runs.dense, runs.mhmoe, "--data", runs.data, "--out", out) == 0
    text = out.read_text(encoding="utf-8")
    dense, mhmoe = row_of(text, "dense"), row_of(text, "mhmoe")
    assert (dense["heads"], mhmoe["heads"]) == ("–", "2")
    assert dense["updates"] == mhmoe["updates"] == "8"
    for row, run in ((dense, runs.dense), (mhmoe, runs.mhmoe)):
        assert float(row["tokens/s"].replace(",", "")) > 0
        for split in ("valid", "test"):
            printed = read_evaluation(run / f"eval-{split}.log")
            assert float(row[f"{split} ppl"].replace(",", "")) == pytest.approx(printed.perplexity)
    assert dense["active experts"] == "–" and 0 < float(mhmoe["active experts"].rstrip(" %")) <= 100
    assert mhmoe["experts x width"].split(" x ")[0] == str(len(activation_of(runs.mhmoe)["load"][0]))
    for figure in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (out.parent / figure).read_bytes().startswith(PNG)
    assert len(re.findall(r"!\[", text)) == 3
    assert "tokens/s" in capsys.readouterr().out


def activation_of(run: Path) -> dict:
    return json.loads((run / "activation-valid.json").read_text())


def test_bits_per_byte_count_the_bytes_of_the_text(runs, tmp_path: Path) -> None:
    out = tmp_path / "report.md"
    assert report(runs.dense, "--data", runs.data, "--out", out, "--no-plots") == 0
    evaluation = read_evaluation(runs.dense / "eval-test.log")
    size = (runs.data / "text" / "test.txt").stat().st_size
    expected = evaluation.loss * evaluation.tokens / size
    assert float(row_of(out.read_text(), "dense")["test bits/byte"]) == pytest.approx(expected, abs=1e-4)


def test_parameters_are_those_in_the_checkpoint(runs, tmp_path: Path) -> None:
    import torch

    out = tmp_path / "report.md"
    assert report(runs.mhmoe, "--data", runs.data, "--out", out, "--no-plots") == 0
    state = torch.load(runs.mhmoe / "checkpoint_last.pt", weights_only=True)["model"]
    sizes = {name: value.numel() for name, value in state.items() if value.is_floating_point()}
    sizes.pop("decoder.output_projection.weight", None)  # the embedding, tied
    assert row_of(out.read_text(), "mhmoe")["parameters"] == f"{sum(sizes.values()) / 1e6:,.2f}M"


def test_a_second_report_measures_nothing_again(runs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = runs.copy("mhmoe", tmp_path / "mhmoe")
    (run / "activation-valid.json").unlink(missing_ok=True)
    for expected in (1, 0):
        assert report(run, "--data", runs.data, "--out", tmp_path / "report.md", "--no-plots") == 0
        assert capsys.readouterr().out.count("measuring the experts") == expected


def test_settings_that_differ_are_listed(runs) -> None:
    from mhmoe_fairseq.analysis.reports import runs as run_module
    from mhmoe_fairseq.analysis.reports.summary import differing_settings

    one, two = run_module.read_run(runs.dense), run_module.read_run(runs.mhmoe)
    assert differing_settings([one, two]) == {}
    two.settings["optimization"]["lr"] = [0.5]
    assert differing_settings([one, two]) == {"--lr": ["0.002", "0.5"]}


def test_a_checkpoint_from_before_a_flag_is_read_with_its_default(runs) -> None:
    from mhmoe_fairseq.analysis.reports.runs import read_run

    run = read_run(runs.mhmoe)
    del run.settings["model"]["mhmoe_shared_expert_dim"]
    assert run.options.mhmoe_shared_expert_dim is None
    assert run.options.mhmoe_heads_number == 2


def test_runs_of_other_data_are_refused(runs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = runs.copy("dense", tmp_path / "dense")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["files"]["train.bin"]["sha256"] = "0" * 64
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert report(runs.mhmoe, run, "--data", runs.data, "--out", tmp_path / "report.md") == 2
    assert "was trained on other data" in error_of(capsys)
    assert not (tmp_path / "report.md").exists()


def test_the_data_hash_is_the_same_with_and_without_a_manifest(runs, tmp_path: Path) -> None:
    import shutil

    plain = shutil.copytree(runs.data, tmp_path / "plain")
    (plain / "manifest.json").unlink()
    assert identify_data(plain).digest == identify_data(runs.data).digest
    with open(plain / "test.bin", "ab") as file:
        file.write(b"\0\0")
    assert identify_data(plain).digest != identify_data(runs.data).digest


@pytest.mark.parametrize(
    "damage, message",
    [
        ("missing", r"RUN_DIR \(.*\) does not exist"),
        ("no log", "train.log is missing"),
        ("foreign log", "train.log has no training record"),
        ("no checkpoint", "has no checkpoint"),
        ("truncated checkpoint", "no readable checkpoint"),
        ("failed evaluation", "eval-test.log has no result"),
    ],
)
def test_a_broken_run_is_one_clear_line(
    runs, tmp_path: Path, capsys: pytest.CaptureFixture, damage: str, message: str
) -> None:
    run = tmp_path / "broken"
    if damage != "missing":
        runs.copy("mhmoe", run)
    if damage == "no log":
        (run / "train.log").unlink()
    elif damage == "foreign log":
        (run / "train.log").write_text("epoch 1 | loss 3\n")
    elif damage == "no checkpoint":
        for path in run.glob("*.pt"):
            path.unlink()
    elif damage == "truncated checkpoint":
        path = run / "checkpoint_last.pt"
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "failed evaluation":
        (run / "eval-test.log").write_text("Killed\n")
    assert report(run, "--data", runs.data, "--out", tmp_path / "report.md") == 2
    assert re.search(message, error_of(capsys))


def test_missing_evaluations_are_dashes(runs, tmp_path: Path) -> None:
    run = runs.copy("dense", tmp_path / "dense")
    (run / "eval-test.log").unlink()
    assert report(run, "--data", runs.data, "--out", tmp_path / "report.md", "--no-plots") == 0
    row = row_of((tmp_path / "report.md").read_text(), "dense")
    assert (row["test ppl"], row["test bits/byte"]) == ("–", "–") and row["valid ppl"] != "–"


def test_without_matplotlib_the_error_names_the_install_line(
    runs, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert report(runs.dense, "--data", runs.data, "--out", tmp_path / "report.md") == 2
    assert "pip install 'mhmoe-fairseq[plots]'" in error_of(capsys)


def seeds(runs, root: Path) -> Path:
    for model in ("dense", "mhmoe"):
        for seed, perplexity in ((1, 20.0), (2, 22.0), (3, 24.0)):
            run = runs.copy(model, root / model / f"seed-{seed}")
            value = perplexity * (1.0 if model == "dense" else 0.9)
            (run / "eval-test.log").write_text(
                f"Evaluated 1,000 tokens in 1s\nLoss (base 2): {math.log2(value):.4f}, Perplexity: {value:.2f}\n"
            )
    return root


def test_several_seeds_give_mean_and_standard_deviation(runs, tmp_path: Path) -> None:
    root, out = seeds(runs, tmp_path / "runs"), tmp_path / "report.md"
    flags = ["--aggregate", "--reference", "dense", "--activation-split", "none"]
    assert report(root, "--data", runs.data, "--out", out, *flags) == 0
    text = out.read_text(encoding="utf-8")
    dense, mhmoe = row_of(text, "dense"), row_of(text, "mhmoe")
    assert dense["seeds"] == "3" and dense["test ppl"] == "22.00 ± 2.00"
    assert mhmoe["test ppl"] == "19.80 ± 1.80"
    assert mhmoe["test ppl against dense"] == "-10.0 % ± 0.0"
    (figure,) = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert (out.parent / figure).read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--aggregate", "--reference", "xmoe"], r"--reference \(xmoe\) must be one of dense, mhmoe"),
        (["--reference", "dense"], "--reference needs --aggregate"),
    ],
)
def test_a_bad_reference_is_refused(
    runs, tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], message: str
) -> None:
    root = seeds(runs, tmp_path / "runs")
    arguments = ["--data", runs.data, "--out", tmp_path / "report.md", "--activation-split", "none"]
    assert report(root, *arguments, *flags) == 2
    assert re.search(message, error_of(capsys))


def test_a_folder_without_seeds_is_refused(runs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert report(runs.dense, "--aggregate", "--data", runs.data, "--out", tmp_path / "report.md") == 2
    assert "has no run folder named MODEL/seed-N" in error_of(capsys)
