"""What the tests of experiments share."""

from pathlib import Path

import pytest
from command_stand_ins import Commands

from mhmoe_fairseq.experiments import runner


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Stand-ins in place of the commands, and prepared data."""
    found = Commands(tmp_path)
    monkeypatch.setattr(runner, "call", found)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text("{}")
    return found
