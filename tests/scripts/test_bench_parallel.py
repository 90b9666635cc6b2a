"""scripts/bench_parallel.py: ranks against one process, and what passed between them against the plan."""

import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

import bench_parallel
from _bench.parallel_report import ParallelResults, expected, verdict
from _bench.team import Sent, Team
from _bench.timing import Pairs
from _bench.training import TrainingSetting

TINY = TrainingSetting(size="tiny", sentences=4, tokens_per_sample=16, vocab_size=50, num_experts=4)


@pytest.fixture(scope="module")
def measured() -> tuple[list[float], list[Sent], dict, list[dict[str, float]]]:
    """One update of two ranks."""
    team = Team("mhmoe-params", TINY, 2, 1)
    try:
        return team(), team.sent(), team.shape, team.profile()
    finally:
        team.close()


def test_rows_transfers_and_counts_are_the_plans(measured) -> None:
    losses, sent, shape, _ = measured
    assert losses[0] == losses[1] and 5 < losses[0] < 8  # bits, of 50 words
    plan, layers = expected(shape, TINY, 2), shape["layers"]
    assert (plan.size, layers) == (2, 2)
    for one in sent:
        assert one.directions == plan.transfers * layers == 8
        assert one.count_bytes == plan.count_bytes * plan.count_transfers * layers
    assert sum(one.rows for one in sent) == 2 * plan.rows * plan.transfers * layers
    # Nobody chooses evenly, but not all rows stay, nor do all leave.
    assert 0 < sum(one.bytes for one in sent) < 2 * plan.bytes * plan.transfers * layers


def test_the_profile_has_every_part_and_no_more_than_the_whole(measured) -> None:
    for profile in measured[3]:
        inside = profile["of forward and backward: all-to-all"]
        assert 0 < inside < profile["forward and backward"] < profile["whole update"]
        assert {"sum of gradients", "norm and clipping", "Adam"} <= profile.keys()


def test_the_verdict_is_about_tokens_per_second() -> None:
    pairs = Pairs((1.0,) * 7, (0.86,) * 7)  # seconds of the ranks, of one process
    results = ParallelResults({}, 0, (1.0, 1.0), pairs, [], [])
    line, is_met = verdict(results, 2, 2)
    assert is_met and "0.860" in line
    assert not verdict(ParallelResults({}, 0, (1.0, 1.0), Pairs((1.0,) * 7, (0.84,) * 7), [], []), 2, 2)[1]


def test_different_losses_stop_the_comparison() -> None:
    bench_parallel.check_same(9.0, 9.0001)
    with pytest.raises(RuntimeError, match="9.0000 bits on the ranks and 9.1000 in one process"):
        bench_parallel.check_same(9.0, 9.1)


@pytest.mark.parametrize("flags, message", [
    (["--sentences", "3"], "--sentences (3) must be a multiple of --ranks (2)"),
    (["--threads", "3"], "--threads (3) must be a multiple of --ranks (2)"),
    (["--output", "report.txt"], "must end in .md"),
])  # fmt: skip
def test_bad_flags_are_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert bench_parallel.main(flags) == 2
    assert message in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_writes_a_report(tmp_path: Path) -> None:
    output = tmp_path / "report.md"
    flags = ["--size", "tiny", "--sentences", "2", "--tokens-per-sample", "16", "--vocab", "50", "--pairs", "1"]
    assert bench_parallel.main([*flags, "--threads", "2", "--output", str(output)]) == 0
    report = output.read_text(encoding="utf-8")
    assert re.search(r"\| all ranks \|  \| (\d+) \|.*\n\| plan, each rank \| 8 \| \1 \|", report)
    assert "Where an update's time goes" in report
