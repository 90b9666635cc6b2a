"""Progress with the time that remains: in a terminal alone, and only of what takes long."""

import io

import pytest

from mhmoe_fairseq.common import timing


@pytest.mark.parametrize("is_terminal, delay, shown", [(True, 0.0, True), (True, 1e9, False), (False, 0.0, False)])
def test_items_pass_and_the_remaining_time_is_shown(monkeypatch, is_terminal: bool, delay: float, shown: bool) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(timing, "_DELAY", delay)
    assert list(timing.tracked(iter("abc"), "evaluate", "batches", total=3)) == ["a", "b", "c"]
    assert ("evaluate:   0%" in stream.getvalue() and "/3 [" in stream.getvalue()) == shown
    assert shown or not stream.getvalue().strip()
