"""Commands as processes of their own: their lines, their errors, their end."""

from pathlib import Path

import pytest

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.experiments import calls
from mhmoe_fairseq.experiments.calls import Calls, last_error


def test_a_command_that_fails_tells_its_last_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(calls._MODULES, "mhmoe", "this")
    said: list[str] = []
    Calls().run(["mhmoe"], {"OMP_NUM_THREADS": "3"}, said.append, tmp_path / "output")
    assert any("Zen" in line for line in said) and "Zen" in (tmp_path / "output").read_text()
    monkeypatch.setitem(calls._MODULES, "mhmoe", "no_such_module")
    with pytest.raises(UserError, match="No module named no_such_module"):
        Calls().run(["mhmoe"], {}, said.append)
    lines = [
        "[rank1]: ValueError: a bad flag",
        "RuntimeError: Connection closed by peer",
        "x.ChildFailedError: 1",
        "bye",
    ]
    assert last_error(lines) == "[rank1]: ValueError: a bad flag" and last_error(["bye", ""]) == "bye"
    assert last_error(["fairseq-train: error: --lr", "bye"]) == "fairseq-train: error: --lr"


def test_stopped_what_runs_ends_and_nothing_begins_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(calls._MODULES, "mhmoe", "timeit")
    long, said = "print('begun', flush=True); __import__('time').sleep(20)", list[str]()
    ours = Calls()
    with pytest.raises(UserError, match="begun"):  # the last line of a process that was ended
        ours.run(["mhmoe", "-n", "1", "-r", "1", long], {}, lambda line: ours.stop())
    with pytest.raises(UserError, match="was not begun, since all were stopped"):
        ours.run(["mhmoe", "-n", "1", "print('begun')"], {}, said.append)
    assert not said
