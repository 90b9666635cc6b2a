"""``mhmoe report-tasks`` on files as ``mhmoe predict`` and ``mhmoe caption`` write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.commands.report_tasks import report_tasks


def write_scores(folder: Path, task: str, name: str, split: str, **scores: Any) -> None:
    path = folder / task / name / f"scores-{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"split": split, **scores}), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two models; the second was captioned from a folder without training captions."""
    for name, score in (("dense", 41.25), ("xmoe", 43.5)):
        guesses = {"question only": 37.5}
        figures = {"VQA score": score}
        write_scores(tmp_path, "vqa", name, "test", count=1210, figures=figures, baselines=guesses, derived=True)
    captions = {"BLEU-4": 7.0, "METEOR": None, "CIDEr": 25.0, "SPICE": None}
    constant = {"caption": "flag", "figures": {"BLEU-4": 0.0, "METEOR": None, "CIDEr": 5.5, "SPICE": None}}
    write_scores(
        tmp_path, "captioning", "dense", "test", images=142, figures=captions, constant=constant,
        absent={"meteor": "there is no Java"},
    )  # fmt: skip
    write_scores(tmp_path, "captioning", "xmoe", "test", images=142, figures={"CIDEr": 30.0}, constant=None)
    return tmp_path


def test_models_baselines_and_the_papers_figures_are_kept_apart(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["report-tasks", str(folder), "--out", str(folder / "table.md")]) == 0
    text = (folder / "table.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() == text.strip()
    ours, paper = text.split("## The paper's table 4")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in ours.splitlines() if line.startswith("|")]
    assert rows[0] == ["", "questions, test", "BLEU-4", "METEOR", "CIDEr", "SPICE"]
    assert rows[2:] == [
        ["dense", "41.25", "7.00", "–", "25.00", "–"],
        ["xmoe", "43.50", "–", "–", "30.00", "–"],
        ["*question only*", "37.50", "–", "–", "–", "–"],
        ["*one caption for all*", "–", "0.00", "–", "5.50", "–"],
    ]
    assert "METEOR is absent: there is no Java." in ours and "neither VQAv2 nor NLVR2" in ours
    assert "- questions, test (37.50, two standard errors 2.78): dense +3.75, xmoe +6.00\n" in ours
    assert "- BLEU-4 (0.00): dense +7.00\n" in ours
    assert "vqa test 1,210, captioning test 142" in ours and "71.4" not in ours and "71.4" in paper


def test_a_model_that_guesses_no_worse_without_the_image_is_named(folder: Path) -> None:
    for name, score in (("mhmoe-params", 37.5), ("mhmoe-flops", 40.0)):
        guesses = {"question only": 37.5}
        write_scores(folder, "vqa", name, "test", count=1210, figures={"VQA score": score}, baselines=guesses)
    text = report_tasks(folder, ["dense", "mhmoe-params", "mhmoe-flops"])
    assert (
        "dense +3.75, mhmoe-params +0.00, mhmoe-flops +2.50; **not clearly above it: mhmoe-params, mhmoe-flops**"
        in text
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--names", "dense", "smoe"], "no scores of smoe"),
        (["--names", "broken"], "scores-test.json: not the scores that mhmoe predict"),
    ],
)
def test_missing_and_foreign_files_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    (folder / "vqa" / "broken").mkdir()
    (folder / "vqa" / "broken" / "scores-test.json").write_text("[]", encoding="utf-8")
    assert main(["report-tasks", str(folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_empty_folder_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["report-tasks", str(tmp_path)]) == 2
    assert "no TASK/NAME/scores-SPLIT.json in it" in capsys.readouterr().err
