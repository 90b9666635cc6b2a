"""What a run writes of itself."""

import json
from pathlib import Path

from command_stand_ins import Commands, reproduce

from mhmoe_fairseq.experiments import run


def test_a_run_knows_the_commits_that_it_was_trained_with(commands: Commands, tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "out" / "dense" / "seed-1" / "run.json"

    def trained_with(commit: str | None, *words: str) -> list[str]:
        monkeypatch.setattr(run, "commit", lambda: commit)
        assert reproduce(tmp_path, "table1", "--models", "dense", *words) == 0
        return json.loads(file.read_text())["trained_at"]

    assert trained_with("one") == trained_with("two") == ["one"]  # finished: nothing is trained
    file.write_text(json.dumps({**json.loads(file.read_text()), "finished": False}))
    assert trained_with("two") == ["one", "two"]
    assert trained_with(None, "--", "--lr", "1e-3") == []  # anew, with an installed package
