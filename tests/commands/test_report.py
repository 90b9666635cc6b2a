"""``mhmoe report``: what it opens, and what it refuses; its tables are in tests/analysis/reports."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
from written_runs import make_record, text_metrics, write_run

from mhmoe_fairseq.commands.main import main


def report(*arguments: object) -> int:
    return main(["report", *map(str, arguments)])


def error_of(capsys: pytest.CaptureFixture) -> str:
    error = capsys.readouterr().err
    assert error.startswith("mhmoe report: error: ") and error.count("\n") == 1
    return error


def test_a_report_on_ten_runs_opens_no_checkpoint_and_no_data(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for model in ("dense", "mhmoe"):
        for seed in range(1, 6):
            run = tmp_path / "runs" / model / f"seed-{seed}"
            write_run(run, make_record(text_metrics(20.0 + seed), model=model, data={"digest": "0", "path": "/gone"}))
            for name in ("checkpoint_best.pt", "checkpoint_last.pt"):
                (run / name).mkdir()  # whoever opens it as a file fails, whatever the user's rights
    out = tmp_path / "report.md"
    assert report(tmp_path / "runs", "--out", out, "--aggregate", "--reference", "dense") == 0
    printed = capsys.readouterr().out
    assert "| 23.00 ± 1.58 |" in printed and printed.endswith(f"report: {out}\n")
    assert (tmp_path / "report-plots" / "seeds-test-ppl.png").is_file()


@pytest.mark.parametrize(
    "damage, message",
    [
        ("missing", r"RUN_DIR \(.*\) does not exist"),
        ("empty", "has no run: a folder with train.log, or record-SPLIT.json"),
        ("foreign log", "train.log has no training record"),
        ("foreign record", "record-test.json: schema .* must be mhmoe-record/1"),
        ("other data", "was evaluated on other data .* than --data"),
    ],
)
def test_a_broken_run_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, damage: str, message: str
) -> None:
    run, flags = tmp_path / "broken", []
    if damage == "empty":
        run.mkdir()
    elif damage != "missing":
        write_run(run, make_record(text_metrics(20.0)))
    if damage == "foreign log":
        (run / "train.log").write_text("epoch 1 | loss 3\n")
    elif damage == "foreign record":
        (run / "record-test.json").write_text(json.dumps({"total": 3}))
    elif damage == "other data":
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "dict.txt").write_text("w0 1\n")
        flags = ["--data", tmp_path / "data"]
    assert report(run, *flags, "--out", tmp_path / "report.md") == 2
    assert re.search(message, error_of(capsys)) and not (tmp_path / "report.md").exists()


def test_without_matplotlib_the_error_names_the_install_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "dense", make_record(text_metrics(20.0)))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert report(run, "--out", tmp_path / "report.md") == 2
    assert "pip install 'mhmoe-fairseq[plots]'" in error_of(capsys)
    assert report(run, "--out", tmp_path / "report.md", "--no-plots", "--paper", "table5") == 0
    assert "| xmoe, paper | 14.82 |" in re.sub(" +", " ", (tmp_path / "report.md").read_text())
    assert report(run, "--no-plots", "--paper", "table99") == 2
    assert "--paper (table99) must be one of " in error_of(capsys)
