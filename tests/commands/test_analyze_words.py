"""``mhmoe analyze --polysemy`` on really trained, tiny models, over a course of updates."""

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mhmoe_fairseq.analysis.reports.polysemy import describe_polysemy
from mhmoe_fairseq.analysis.reports.runs import read_model
from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.common.files import write_json
from mhmoe_fairseq.evaluation.records import read_record

LISTS = {
    "polysemous": "river farmer teacher engine garden letter finds follows carries near behind along".split(),
    "control": "winter captain window market forest doctor crosses leaves watches under before the absent".split(),
}


def analyze(*words: object) -> int:
    return main(["analyze", *map(str, words)])


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    write_json(tmp_path / "words.json", LISTS)
    return tmp_path / "words.json"


def test_a_course_of_updates(runs, tmp_path: Path, lists: Path, capsys: pytest.CaptureFixture) -> None:
    last = runs.copy("mhmoe", tmp_path / "mhmoe") / "checkpoint_last.pt"
    state = torch.load(last, weights_only=True)
    state["optimizer_history"][-1]["num_updates"] = 3
    torch.save(state, last.with_name("checkpoint_1_3.pt"))
    flags = ["--data", runs.data, "--polysemy", lists, "--split", "test"]
    assert analyze(last, last.with_name("checkpoint_1_3.pt"), last.with_name("checkpoint_best.pt"), *flags) == 0
    record, output = read_record(last.parent / "record-polysemy-test.json"), capsys.readouterr().out
    assert (record.what, record.split, record.checkpoint["updates"]) == ("polysemy", "test", 8)
    updates = [row["updates"] for row in record.settings["course"]]
    assert updates == sorted({3, *updates}) and updates[-1] == 8
    pairs = record.settings["pairs"]
    assert len(pairs) == record.main.count >= 2 and all(one in LISTS["polysemous"] for one, _, _, _ in pairs)
    left, right = (np.array([pair[side] for pair in pairs]) for side in (1, 3))
    assert record.main.value == pytest.approx((left - right).mean())
    found = {}
    for group, values in (("polysemous", left), ("control", right)):
        metric = record.parts[group]["experts per token"]
        assert metric.value == pytest.approx(values.mean()) and 1 <= metric.value <= 4
        assert metric.stderr == pytest.approx(values.std(ddof=1) / len(pairs) ** 0.5)
        found[group] = record.parts[f"all {group}"]["experts per token"].count
        assert len(pairs) <= found[group] <= 12
    low, high = record.settings["interval"]
    assert low <= record.main.value <= high and record.settings["most_experts"] == 4
    for name in ("polysemy-test.png", "polysemy-test-course.png"):
        assert (last.parent / name).read_bytes().startswith(b"\x89PNG")
    assert "words: given by the user" in output
    assert output.count("routing test with") == len(record.settings["course"])
    row = [8, 4, f"{left.mean():.3f}", f"{right.mean():.3f}", f"{(left - right).mean():+.3f}"]
    assert "".join(f"|{cell}" for cell in row) in output.replace(" ", "")
    assert re.search(rf"\| control +\| +{len(pairs)} \|.* {found['control']} \|", output)


def test_only_the_same_file_is_left_out(runs, tmp_path: Path, lists: Path) -> None:
    last = runs.copy("mhmoe", tmp_path / "mhmoe") / "checkpoint_last.pt"
    shutil.copyfile(last, last.with_name("again.pt"))
    state = torch.load(last, weights_only=True)
    state["model"]["decoder.embed_tokens.weight"] *= 2  # as many updates, other weights
    torch.save(state, last.with_name("mean.pt"))
    files = (last, last.with_name("again.pt"), last.with_name("mean.pt"))
    assert analyze(*files, "--data", runs.data, "--polysemy", lists, "--no-plots") == 0
    record = read_record(last.parent / "record-polysemy-valid.json")
    assert [row["updates"] for row in record.settings["course"]] == [8, 8]


def test_trainings_have_records_of_their_own(runs, tmp_path: Path, lists: Path, capsys: pytest.CaptureFixture) -> None:
    one, other = (runs.copy("mhmoe", tmp_path / model / "seed-1") for model in ("one", "other"))
    words = [one, other, "--data", runs.data, "--polysemy", lists, "--no-plots"]
    assert analyze(*words) == 0
    assert all((folder / "record-polysemy-valid.json").is_file() for folder in (one, other))
    assert re.search(r"\| one/seed-1 .*\n\| other/seed-1 ", capsys.readouterr().out)
    names = [record.what for record in read_model("one", [one]).runs[0].records]
    assert names[-1] == "polysemy"  # splits come first
    assert analyze(*words, "--out", tmp_path) == 2
    assert "--out" in capsys.readouterr().err


def test_a_token_that_is_not_split_is_told_so(runs, tmp_path: Path, lists: Path) -> None:
    flags = ["--data", runs.data, "--polysemy", lists, "--out", tmp_path / "out", "--no-plots"]
    assert analyze(runs.mhmoe / "checkpoint_last.pt", *flags, "--batch-size", 3) == 0
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["record-polysemy-valid.json"]
    record = read_record(tmp_path / "out" / "record-polysemy-valid.json")
    told = "tokens are not split, each goes to as many experts: nothing can differ"
    assert told not in describe_polysemy({"": [record]})
    unsplit = dataclasses.replace(record, settings={**record.settings, "most_experts": 2})
    assert told in describe_polysemy({"": [unsplit]})


@pytest.mark.parametrize(
    "model, flags, message",
    [
        ("dense", [], "is a dense model: it has no experts to measure"),
        ("mhmoe", ["--threshold", "0.1"], "--threshold has no meaning with --polysemy"),
        ("mhmoe", ["--images", "2"], "--images has no meaning with --polysemy"),
        ("mhmoe", ["--diversity"], "--diversity: not allowed with argument --polysemy"),
        ("mhmoe", ["--split", "holdout"], "holdout.idx is missing"),
        ("mhmoe", ["--polysemy", "FEW"], "valid has 1 polysemous and 1 control words of the lists, which make "),
        ("mhmoe", ["--polysemy", "BAD"], "bad.json: must be an object of the two lists polysemous and control"),
    ],
)
def test_bad_input_is_one_line(
    runs, tmp_path: Path, lists: Path, capsys: pytest.CaptureFixture, model: str, flags: list[str], message: str
) -> None:
    write_json(tmp_path / "few.json", {"polysemous": ["river", "absent"], "control": ["winter"]})
    write_json(tmp_path / "bad.json", [])
    flags = [str(tmp_path / f"{flag.lower()}.json") if flag in ("FEW", "BAD") else flag for flag in flags]
    checkpoint = getattr(runs, model) / "checkpoint_last.pt"
    words = [checkpoint, "--data", runs.data, "--polysemy", lists, "--out", tmp_path / "out", *flags]
    assert analyze(*words) == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
