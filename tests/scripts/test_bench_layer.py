"""scripts/bench_layer.py from its command line to its report."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

import bench_layer
from _bench import contenders
from _bench.records import MemoryRecord, Results, TimeRecord, targets
from _bench.setting import Setting
from _bench.timing import Pairs

SMALL = ["--tokens", "8", "--experts", "4", "--dtypes", "fp32", "--embed-dim", "32", "--heads", "2", "--ffn-dim", "48"]


def timed(tokens: int, experts: int, second: str, ratio: float) -> TimeRecord:
    return TimeRecord(Setting(tokens, experts), "mhmoe", second, Pairs((ratio,) * 7, (1.0,) * 7))


def measured(tokens: int, name: str, tensors: float, resident: float) -> MemoryRecord:
    return MemoryRecord(Setting(tokens, 8), name, tensors, resident)


@pytest.mark.parametrize(
    ("record", "met"),
    [
        (timed(2048, 8, "gemm", 1.20), True),
        (timed(2048, 8, "gemm", 1.21), False),
        (timed(2048, 32, "gemm", 1.25), True),
        (timed(4096, 8, "loop", 1.01), False),
        (timed(2048, 8, "mixtral-grouped", 1 / 1.9), True),
        (timed(2048, 32, "mixtral-grouped", 1 / 1.7), False),
    ],
)
def test_time_targets(record, met):
    assert [target.met for target in targets(Results(times=[record]))] == [met]


@pytest.mark.parametrize(("resident", "met"), [(75.0, True), (85.0, False)])
def test_a_memory_target_needs_both_measures(resident, met):
    memory = [measured(2048, "mhmoe", 70.0, resident), measured(2048, "loop", 100.0, 100.0)]
    assert [target.met for target in targets(Results(memory=memory))] == [met]


@pytest.mark.parametrize(("large", "met"), [(410.0, True), (430.0, False)])
def test_memory_must_be_linear(large, met):
    memory = [measured(2048, "mhmoe", 100.0, 100.0), measured(8192, "mhmoe", large, large)]
    assert [target.met for target in targets(Results(memory=memory))] == [met]


def test_other_settings_decide_no_target():
    other = TimeRecord(Setting(2048, 8, "bf16"), "mhmoe", "gemm", Pairs((1.0,), (1.0,)))
    assert targets(Results(times=[other, timed(1024, 8, "gemm", 1.0)])) == []


def test_run_writes_a_complete_report(tmp_path, capsys):
    output = tmp_path / "report.md"
    status = bench_layer.main(
        [*SMALL, "--rivals", "gemm", "loop", "--no-memory", "--pairs", "2", "--threads", "1", "--output", str(output)]
    )
    report = output.read_text(encoding="utf-8")
    assert status == 0
    assert f"report: {output}" in capsys.readouterr().out
    assert "(incomplete" not in report
    assert "| MH-MoE (ours) | GEMM bound |" in report and "| MH-MoE (ours) | plain autograd loop |" in report
    assert "our layer against the plain loop, T=8 E=4 fp32" in report
    assert not list(tmp_path.glob(".*"))


def test_interrupted_run_leaves_what_it_has(tmp_path, monkeypatch):
    def interrupt(setting):
        raise KeyboardInterrupt

    monkeypatch.setitem(contenders.BUILDERS, "loop", interrupt)
    output = tmp_path / "report.md"
    with pytest.raises(KeyboardInterrupt):
        bench_layer.main(
            [
                *SMALL,
                "--rivals",
                "gemm",
                "loop",
                "--no-memory",
                "--pairs",
                "1",
                "--threads",
                "1",
                "--output",
                str(output),
            ]
        )
    report = output.read_text(encoding="utf-8")
    assert "(incomplete" in report
    assert "| MH-MoE (ours) | GEMM bound |" in report


def test_missing_rival_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(contenders, "has_transformers", lambda: False)
    output = tmp_path / "report.md"
    rivals = ["--rivals", "gemm", "mixtral-grouped"]
    assert (
        bench_layer.main([*SMALL, *rivals, "--no-memory", "--pairs", "1", "--threads", "1", "--output", str(output)])
        == 0
    )
    report = output.read_text(encoding="utf-8")
    assert "grouped_mm was left out: transformers is not installed" in report


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--heads", "5"], "num_heads (5)"),
        (["--top-k", "9", "--experts", "8"], "top_k (9)"),
        (["--output", "report.txt"], "--output (report.txt) must end in .md"),
        (["--quick", "--tokens", "64"], "--tokens contradicts --quick"),
    ],
)
def test_bad_input_is_one_line_before_any_work(flags, message, capsys):
    assert bench_layer.main([*flags, "--threads", "1"]) == 2
    out = capsys.readouterr().out.strip().splitlines()
    assert len(out) == 1 and out[0].startswith("bench_layer: error:") and message in out[0]


@pytest.mark.slow
def test_memory_is_measured_in_fresh_processes(tmp_path):
    output = tmp_path / "report.md"
    flags = ["--rivals", "loop", "--pairs", "1", "--threads", "1", "--output", str(output)]
    assert bench_layer.main([*SMALL, "--tokens", "512", *flags]) == 0
    rows = [line for line in output.read_text(encoding="utf-8").splitlines() if line.startswith("| T=512 E=4 fp32 |")]
    assert len(rows) == 2
    assert all(float(row.split("|")[3]) > 0 for row in rows)
