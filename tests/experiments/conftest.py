"""What the tests of experiments share."""

from pathlib import Path

import pytest
from command_stand_ins import Commands

from mhmoe_fairseq.data.domains import FILE, write_domains
from mhmoe_fairseq.experiments.calls import Calls
from mhmoe_fairseq.prepare.sources.mix import DOMAINS


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Stand-ins in place of the commands, and prepared data of the mixed corpus's domains."""
    found = Commands(tmp_path)
    monkeypatch.setattr(Calls, "run", lambda calls, *given: found(*given))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text("{}")
    write_domains(tmp_path / "data" / FILE, {"train": DOMAINS})
    return found
