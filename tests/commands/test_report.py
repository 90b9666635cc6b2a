"""``mhmoe report``: what it opens, and what it refuses; its tables are in tests/analysis/reports."""

import base64
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from console import evaluated
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
    page = tmp_path / "page" / "report.html"
    assert report(tmp_path / "runs", "--out", out, "--aggregate", "--reference", "dense", "--html", page) == 0
    printed = capsys.readouterr().out
    assert "| 23.00 ± 1.58 |" in printed and printed.endswith(f"report: {out}, {page}\n")
    plot = (tmp_path / "report-plots" / "seeds-test-ppl.png").read_bytes()
    written = page.read_text(encoding="utf-8")
    assert base64.b64encode(plot).decode() in written and '<td class="number">23.00 ± 1.58</td>' in written
    assert not re.search(r'(src|href)="(?!data:)', written) and "|--" not in written


def test_runs_that_were_really_trained_and_evaluated(runs, tmp_path: Path) -> None:
    copies = [runs.copy(name, tmp_path / name) for name in ("dense", "mhmoe")]
    for run in copies:
        assert main(["evaluate", str(run / "checkpoint_last.pt"), "--data", str(runs.data), "--cpu"]) == 0
    out = tmp_path / "report.md"
    assert report(*copies, "--data", runs.data, "--out", out) == 0
    text = re.sub(" +", " ", out.read_text(encoding="utf-8"))
    header, dense, mhmoe = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()
                            if line.startswith(("| model ", "| dense ", "| mhmoe ")))  # fmt: skip
    dense, mhmoe = dict(zip(header, dense)), dict(zip(header, mhmoe))
    weights = torch.load(copies[1] / "checkpoint_last.pt", weights_only=True)["model"]
    weights.pop("decoder.output_projection.weight", None)  # the embedding, tied
    size = sum(weight.numel() for weight in weights.values() if weight.is_floating_point())
    assert (mhmoe["parameters"], mhmoe["heads"], mhmoe["updates"]) == (f"{size / 1e6:,.2f}M", "2", "8")
    _, bits, perplexity = evaluated((runs.dense / "eval-test.log").read_text())
    assert float(dense["test ppl"]) == pytest.approx(perplexity, abs=0.01)
    assert float(dense["test bits/byte"]) < bits  # a token has more than a byte
    assert dense["active experts"] == "–" and 0 < float(mhmoe["active experts"].rstrip(" %")) <= 100
    assert "| --mhmoe" not in text and "All models share data order" in text


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
