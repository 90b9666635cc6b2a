"""How long the rest of some trainings takes."""

from mhmoe_fairseq.experiments.progress import Progress


def test_remaining_time_counts_what_this_call_did() -> None:
    times = iter([0.0, 100.0, 200.0])
    progress = Progress({"resumed": 200, "other": 200}, clock=lambda: next(times))
    assert progress.reach("resumed", 100) == ""  # earlier updates took no time of ours
    assert progress.reach("resumed", 200) == "; about 3 min of training left"
    assert progress.reach("other", 0) == "; about 7 min of training left"


def test_remaining_time_tells_slow_models_from_fast_ones() -> None:
    updates = {"fast": 100, "slow": 100}
    for slow, left in ((3.0, "5"), (None, "9")):  # hours; one not known: 150 updates like those done
        times = iter([0.0, 180.0])
        progress = Progress(updates, {"fast": 1.0, "slow": slow}, lambda times=times: next(times))
        assert progress.reach("slow", 0) == ""
        assert progress.reach("slow", 50) == f"; about {left} min of training left"
