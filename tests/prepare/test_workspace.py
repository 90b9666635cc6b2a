"""The destination folder: resumed, refused, replaced, never half-done."""

import pytest

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.common.files import read_json, write_json
from mhmoe_fairseq.prepare.workspace import Workspace

SETTINGS = {"source": {"name": "text", "inputs": ["a"]}, "vocab_size": 300, "seed": 1}


def make(dest, settings=SETTINGS, *, text="one", overwrite=False, stop_before_publish=False, name="a.txt"):
    """One preparation with two stages; returns the state, what was said and which stages ran."""
    said, ran = [], []
    workspace = Workspace(dest, settings)
    state = workspace.begin(overwrite=overwrite, say=said.append)
    if state != "complete":

        def first():
            ran.append("first")
            (workspace.partial / name).write_text(text)
            return {"length": len(text)}

        result = workspace.stage("first", [name], first)
        assert result == {"length": len(text)}
        if stop_before_publish:
            raise KeyboardInterrupt
        workspace.stage("second", [], lambda: ran.append("second"))
        workspace.publish({"note": text}, [name])
    return state, said, ran


def visible(dest):
    return sorted(path.name for path in dest.iterdir() if not path.name.startswith("."))


def test_fresh_then_complete(tmp_path):
    assert make(tmp_path / "d") == ("fresh", [], ["first", "second"])
    assert visible(tmp_path / "d") == ["a.txt", "manifest.json"]
    assert not (tmp_path / "d" / ".partial").exists()
    manifest = read_json(tmp_path / "d" / "manifest.json")
    assert manifest["settings"] == SETTINGS and manifest["note"] == "one"
    assert manifest["files"]["a.txt"]["bytes"] == 3
    assert make(tmp_path / "d") == ("complete", [], [])


def test_an_interrupted_run_continues_after_its_last_stage(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, stop_before_publish=True)
    assert visible(tmp_path) == []
    assert make(tmp_path) == ("resumed", [], ["second"])
    assert visible(tmp_path) == ["a.txt", "manifest.json"]


def test_a_stage_whose_output_was_damaged_runs_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, stop_before_publish=True)
    (tmp_path / ".partial" / "a.txt").write_text("cut off")
    assert make(tmp_path)[2] == ["first", "second"]
    assert (tmp_path / "a.txt").read_text() == "one"


@pytest.mark.parametrize(
    "changed, message",
    [
        ({**SETTINGS, "vocab_size": 400}, "made with another --vocab-size \\(300, now 400\\)"),
        (
            {**SETTINGS, "source": {"name": "text", "inputs": ["b"]}},
            "another --source inputs \\(\\['a'\\], now \\['b'\\]\\)",
        ),
        ({**SETTINGS, "extra": 1}, "another --extra \\(None, now 1\\)"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, changed, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        make(tmp_path, changed)
    assert make(tmp_path)[0] == "complete"


def test_overwrite_replaces_and_removes_what_is_no_longer_made(tmp_path):
    make(tmp_path, name="old.txt")
    assert make(tmp_path, {**SETTINGS, "seed": 2}, text="two", overwrite=True)[0] == "fresh"
    assert visible(tmp_path) == ["a.txt", "manifest.json"]
    assert (tmp_path / "a.txt").read_text() == "two"


def test_an_interrupted_overwrite_leaves_the_earlier_data_usable(tmp_path):
    make(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, {**SETTINGS, "seed": 2}, text="two", overwrite=True, stop_before_publish=True)
    assert (tmp_path / "a.txt").read_text() == "one"
    assert read_json(tmp_path / "manifest.json")["settings"] == SETTINGS
    assert make(tmp_path, {**SETTINGS, "seed": 2}, text="two", overwrite=True) == ("resumed", [], ["second"])


def test_an_unfinished_run_with_other_settings_is_thrown_away_with_a_word(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, stop_before_publish=True)
    state, said, ran = make(tmp_path, {**SETTINGS, "seed": 2}, text="two")
    assert (state, ran) == ("fresh", ["first", "second"])
    assert len(said) == 1 and "throwing away an unfinished preparation made with another --seed (1)" in said[0]


def test_a_kill_between_two_moves_is_finished_by_the_next_run(tmp_path):
    make(tmp_path)
    workspace = Workspace(tmp_path, {**SETTINGS, "seed": 2})
    workspace.begin(overwrite=True, say=print)
    for name in ("a.txt", "b.txt"):
        (workspace.partial / name).write_text("new " + name)
    files = {name: {"bytes": 9} for name in ("a.txt", "b.txt")}
    write_json(workspace.partial / "manifest.json", {"settings": workspace.settings, "files": files})
    write_json(workspace.partial / "progress.json", {"settings": workspace.settings, "stages": {}, "publishing": True})
    (workspace.partial / "a.txt").replace(tmp_path / "a.txt")  # killed here
    assert make(tmp_path, {**SETTINGS, "seed": 2})[0] == "complete"
    assert visible(tmp_path) == ["a.txt", "b.txt", "manifest.json"]
    assert (tmp_path / "b.txt").read_text() == "new b.txt"


def test_damaged_data_is_named_and_overwrite_mends_it(tmp_path):
    make(tmp_path)
    (tmp_path / "a.txt").write_text("o")
    with pytest.raises(UserError, match="a.txt: has 1 bytes, manifest.json says 3 bytes; add --overwrite"):
        make(tmp_path)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match="a.txt: is missing"):
        make(tmp_path)
    assert make(tmp_path, overwrite=True)[0] == "fresh"
    assert (tmp_path / "a.txt").read_text() == "one"


def test_data_that_was_not_made_here_is_not_overwritten(tmp_path):
    (tmp_path / "dict.txt").write_text("a 1\n")
    with pytest.raises(UserError, match="holds dict.txt but no manifest.json, so it was not made here"):
        make(tmp_path)
    assert visible(tmp_path) == ["dict.txt"]


def test_a_destination_that_fairseq_could_not_open_is_refused(tmp_path):
    with pytest.raises(UserError, match="--dest .*a:b: must have no ':' in its path"):
        make(tmp_path / "a:b")
    assert not list(tmp_path.iterdir())
