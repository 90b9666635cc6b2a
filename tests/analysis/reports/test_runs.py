"""Reading fairseq's logs: repeated, resumed, cut-off and foreign ones."""

import json
from pathlib import Path

import pytest

from mhmoe_fairseq.analysis.reports.runs import read_training_log


def inner(updates: int, wps: float = 100, **more: object) -> str:
    return json.dumps({"epoch": 1, "loss": "9.5", "wps": str(wps), "num_updates": str(updates), **more})


def valid(updates: int, ppl: float) -> str:
    return json.dumps({"epoch": 1, "valid_loss": "3.0", "valid_ppl": str(ppl), "valid_num_updates": str(updates)})


def write(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "train.log"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_records_are_sorted_by_kind_and_other_lines_ignored(tmp_path: Path) -> None:
    lines = ["{'_name': None, 'common': {}}", "MHMoELanguageModel(", inner(10), valid(10, 50), inner(20), valid(20, 40)]
    log = read_training_log(write(tmp_path, *lines, '{"epoch": 1, "train_loss": "4", "train_num_updates": "20"}'))
    assert log.num_updates == 20
    assert log.curve("loss") == [(10, 9.5), (20, 9.5)]
    assert log.curve("valid_ppl") == [(10, 50), (20, 40)]
    assert log.curve("gate_loss") == []


def test_a_record_written_twice_counts_once_and_the_last_wins(tmp_path: Path) -> None:
    log = read_training_log(write(tmp_path, inner(10, 1), inner(20, 2), inner(20, 3), inner(10, 5), valid(20, 40)))
    assert [record["wps"] for record in log.inner] == [5, 3]


def test_a_record_may_stand_behind_the_heading_of_a_log_line(tmp_path: Path) -> None:
    heading = "2026-11-22 01:00:00 | INFO | train_inner | "
    assert read_training_log(write(tmp_path, heading + inner(10), "[]")).num_updates == 10


def test_a_line_cut_off_by_a_kill_is_ignored(tmp_path: Path) -> None:
    assert read_training_log(write(tmp_path, inner(10), inner(20)[:25])).num_updates == 10


def test_speed_leaves_out_warm_up_and_intervals_with_a_validation(tmp_path: Path) -> None:
    speeds = {10: 5, 20: 100, 30: 20, 40: 110, 50: 120}
    log = read_training_log(write(tmp_path, *(inner(end, wps) for end, wps in speeds.items()), valid(20, 40)))
    assert log.tokens_per_second() == 110  # of 100, 110 and 120: 30's interval began with a validation


def test_peak_memory_is_the_most_of_a_run_and_of_its_resumption(tmp_path: Path) -> None:
    lines = [inner(10, peak_gb="1.25"), inner(20, peak_gb="1.5"), inner(30, peak_gb="1.1")]
    assert read_training_log(write(tmp_path, *lines)).peak_memory() == 1.5
    assert read_training_log(write(tmp_path, inner(10))).peak_memory() is None


def test_speed_of_a_run_that_validates_all_the_time(tmp_path: Path) -> None:
    lines = [line for end in (10, 20, 30) for line in (inner(end, end), valid(end, 40))]
    assert read_training_log(write(tmp_path, *lines)).tokens_per_second() == 25


@pytest.mark.parametrize("text", ["", "nothing here\n", '{"other": 1}\n'])
def test_a_log_without_records_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "train.log"
    path.write_text(text)
    with pytest.raises(ValueError, match="train.log has no training record: train with --log-format json"):
        read_training_log(path)


def test_a_missing_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train.log is missing"):
        read_training_log(tmp_path / "train.log")
