"""scripts/bench/layer.py: work, memory and time are counted rightly, contenders compute one function, the report."""

import mmap
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

from bench import console
from bench import layer as bench_layer
from bench.contenders import SIZES, Setting, build, gemm_bound
from bench.layer import POINTS, Results, growth_table, plan, targets
from bench.memory import tensor_peak
from bench.timing import Pairs, operator_times, seconds, take_turns

TINY = Setting(tokens=24, num_experts=4, embed_dim=32, num_heads=2, top_k=2, ffn_dim=48)
SMALL = ["--tokens", "8", "--experts", "4", "--embed-dim", "32", "--heads", "2", "--ffn-dim", "48"]
FP32 = [*SMALL, "--dtypes", "fp32"]


def bench(*flags, output=None):
    given = ["--threads", "1", "--pairs", "1", *(["--output", str(output)] if output else [])]
    return console.run_benchmark(bench_layer.run, bench_layer.build_parser(), [*given, *flags])


def text_of(report: Path) -> str:
    return re.sub(" +", " ", report.read_text(encoding="utf-8"))  # cells are padded


def counted_flops(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["gemm", "loop", "mixtral-eager"])
def test_contenders_do_the_work_that_the_bound_counts(name):
    """Beside it only the router's two maps (X-MoE) or one (Mixtral), forward and backward."""
    if name == "mixtral-eager":
        pytest.importorskip("transformers", reason="an optional rival of the benchmark")
    subtokens = TINY.tokens * TINY.num_heads
    dim, sub_dim = TINY.config().router_dim, TINY.config().subtoken_dim
    router = {"gemm": 0, "loop": dim * (sub_dim + 4), "mixtral-eager": sub_dim * 4}[name]
    assert counted_flops(build(name, TINY)) == TINY.flops() + 3 * 2 * subtokens * router


@pytest.mark.parametrize("setting", [replace(TINY, tokens=11, num_experts=3), replace(TINY, num_heads=1)])
def test_unequal_shares_lose_no_row_and_one_head_has_no_projections(setting):
    assert counted_flops(gemm_bound(setting.config(), setting.tokens, torch.float32)) == setting.flops()


@pytest.mark.parametrize(("ours", "rival", "setting"), [
    ("mhmoe", "loop", TINY),
    ("mhmoe", "loop", Setting(7, 5, embed_dim=12, num_heads=3, top_k=3, ffn_dim=8)),
    ("mhmoe", "loop", replace(TINY, num_heads=1, top_k=1)),
    ("mhmoe-swiglu", "mixtral-eager", TINY),
])  # fmt: skip
def test_rivals_compute_our_function(ours, rival, setting):
    """Output, losses and, where there is a balance loss, all gradients."""
    if rival == "mixtral-eager":
        pytest.importorskip("transformers", reason="an optional rival of the benchmark")
    first, second = build(ours, setting), build(rival, setting)
    first(), second()  # on another input than the next
    (hidden, balance), (hidden_other, balance_other) = first(), second()
    assert first.inputs[0].ne(first.inputs[1]).all()
    assert relative_error(hidden, hidden_other) < 1e-5
    if balance_other is not None:
        assert relative_error(balance, balance_other) < 1e-5 and relative_error(first.x.grad, second.x.grad) < 1e-5
        for name, parameter in first.module.named_parameters():  # an expert's are numbered there
            parts = [part.grad for of, part in second.module.named_parameters() if f"{of}.".startswith(f"{name}.")]
            assert relative_error(parameter.grad, torch.stack(parts).view_as(parameter)) < 1e-5


def relative_error(value, reference):
    return ((value - reference).abs().max() / reference.abs().max()).item()


def test_torchscale_runs_with_every_gradient():
    step = build("torchscale", TINY)
    hidden, balance = step()
    assert hidden.shape == (TINY.tokens, TINY.embed_dim) and balance > 0
    assert all(parameter.grad is not None for parameter in step.parameters)


def test_peak_counts_what_lives_at_once():
    x = torch.ones(1000)

    def call():
        y = x * 2
        z = y + 1
        del y
        return z.mul_(3) * 2

    assert tensor_peak(call, [x]) == 2 * 4000


def test_peak_counts_what_autograd_keeps():
    x = torch.ones(1000, requires_grad=True)
    # Three results kept for the backward; then one gradient at least beside them. Scalars are a few bytes.
    assert 4 * 4000 <= tensor_peak(lambda: x.exp().exp().exp().sum().backward(), [x]) <= 5 * 4000 + 64


def test_peak_counts_pages_from_elsewhere_and_not_what_existed():
    existing = torch.ones(500)

    def call():
        pages = torch.frombuffer(mmap.mmap(-1, 8192), dtype=torch.float32)
        pages[:500].copy_(existing)

    assert tensor_peak(call, [existing]) == 8192


def test_pairs_alternate_and_medians_are_taken_per_pair():
    calls = []
    take_turns([lambda: calls.append("a") or 1.0, lambda: calls.append("b") or 1.0], 3, lambda: calls.append("."))
    assert "".join(calls) == "ab" + "ab." + "ba." + "ab."
    pairs = Pairs((1.0, 4.0, 3.0), (1.0, 2.0, 2.0))
    assert (pairs.ratio, *pairs.medians) == (1.5, 3.0, 2.0)
    assert pairs.range_text() == "(pairs 1.00 to 2.00)" and pairs.swapped().ratio == pytest.approx(2 / 3)


def timed(setting: Setting, rival: str, ratio: float) -> Results:
    return Results(times={(setting, "mhmoe", rival): Pairs((ratio,) * 7, (1.0,) * 7)})


def measured(**peaks: tuple[int, str, float, float]) -> Results:
    memory = {(Setting(t, 8), name): {"tensors": tensors, "resident": rss} for t, name, tensors, rss in peaks.values()}
    return Results(memory=memory)


WIDE, NARROW = Setting(2048, 8), Setting(2048, 35, embed_dim=128, ffn_dim=448)


@pytest.mark.parametrize(("results", "met"), [
    (timed(WIDE, "gemm", 1.20), [True]),
    (timed(WIDE, "gemm", 1.21), [False]),
    (timed(replace(WIDE, dtype="bf16", threads=1), "gemm", 1.70), [True]),  # each dtype has its limit
    (timed(replace(WIDE, dtype="bf16"), "gemm", 1.71), [False]),
    (timed(replace(WIDE, dtype="autocast"), "gemm", 1.0), []),
    (timed(Setting(2048, 8, "bf16", num_heads=1), "gemm", 1.65), [False]),
    (timed(replace(NARROW, dtype="bf16"), "gemm", 2.6), [True]),
    (timed(NARROW, "gemm", 1.0), []),
    (timed(Setting(4096, 8), "loop", 1.01), [False]),
    (timed(WIDE, "mixtral-grouped", 1 / 1.9), [True]),
    (timed(Setting(2048, 32), "mixtral-grouped", 1 / 1.7), [False]),
    (measured(ours=(2048, "mhmoe", 70.0, 75.0), loop=(2048, "loop", 100.0, 100.0)), [True]),
    (measured(ours=(2048, "mhmoe", 70.0, 85.0), loop=(2048, "loop", 100.0, 100.0)), [False]),  # both measures decide
    (measured(small=(2048, "mhmoe", 100.0, 100.0), large=(8192, "mhmoe", 410.0, 410.0)), [True]),
    (measured(small=(2048, "mhmoe", 100.0, 100.0), large=(8192, "mhmoe", 430.0, 430.0)), [False]),
    (timed(Setting(1024, 8), "gemm", 1.0), []),  # other sizes decide nothing
])  # fmt: skip
def test_targets(results, met):
    assert [met for _, met in targets(results)] == met


def test_autocast_computes_in_bf16_and_keeps_float32():
    step = build("mhmoe", replace(TINY, dtype="autocast"))
    hidden, _ = step()
    assert {parameter.dtype for parameter in step.parameters} == {parameter.grad.dtype for parameter in step.parameters}
    assert hidden.dtype == torch.bfloat16 and step.x.grad.dtype == torch.float32
    plain = build("mhmoe", TINY)
    assert 1e-5 < relative_error(hidden.float(), plain()[0]) < 0.05


def test_growth_is_fitted_on_logarithms():
    times = {tokens: Pairs((5.0 * tokens**2,), (8.0 / tokens,)) for tokens in (1, 2, 4)}
    results = Results(times={(replace(TINY, tokens=tokens), "mhmoe", "gemm"): pairs for tokens, pairs in times.items()})
    assert "K=2 F=48 fp32, 2 threads | T = 1, 2, 4 | T^2.00 | T^-1.00 |" in re.sub(" +", " ", growth_table(results))


def test_cpu_time_counts_work_and_not_waiting():
    assert seconds(lambda: time.sleep(0.2), time.process_time) < 0.1 < seconds(lambda: time.sleep(0.2))


def test_operators_are_of_one_call_and_above_a_share():
    x = torch.randn(300, 300)
    found = operator_times(lambda: (x @ x, x[0] + 1), least=0.5)
    assert [name for name, *_ in found] == ["aten::mm"] and 0.5 < found[0][2] <= 1 and found[0][1] > 0


def test_growth_changes_one_size_at_a_time(tmp_path, monkeypatch):
    args = bench_layer.build_parser().parse_args(["--growth", "--threads", "1", "2"])
    points = bench_layer.chosen_settings(args)[0]
    changes = [sum(getattr(each, size) != getattr(bench_layer.START, size) for size in SIZES) for each in points]
    assert sorted(changes) == 6 * [0] + 6 * (5 + 6 + 6) * [1]  # 6 pairs of threads and number format
    monkeypatch.setattr(bench_layer, "START", replace(TINY, num_heads=4))
    monkeypatch.setattr(bench_layer, "GROWTH", dict(tokens=(8, 16, 24), num_experts=(4, 8, 16), num_heads=(1, 2, 4)))
    assert bench("--growth", "--dtypes", "fp32", output=tmp_path / "report.md") == 0
    report = text_of(tmp_path / "report.md")
    assert len(re.findall(r"\| ([TEH])\^-?[0-9.]+ \| \1\^-?[0-9.]+ \|", report)) == 3
    assert "| D=32 E=4 K=2 F=48 T=24 fp32, 1 thread | H = 1, 2, 4 |" in report


def test_targets_settings_are_measured_without_flags():
    jobs = plan(bench_layer.build_parser().parse_args([]), ["gemm", "loop", "mixtral-grouped"])
    times = [(setting, *names) for what, setting, *names in jobs if what == "time"]
    bound = [setting for setting, _, rival in times if rival == "gemm"]
    assert set(bound) == {replace(point, dtype=dtype) for point in POINTS for dtype in ("fp32", "bf16", "autocast")}
    loops = [(setting.tokens, setting.num_experts, setting.dtype) for setting, _, rival in times if rival == "loop"]
    sizes, dtypes = [(2048, 8), (2048, 32), (4096, 8)], ["fp32", "bf16"]
    assert sorted(loops) == sorted((*size, dtype) for size in sizes for dtype in dtypes)
    assert sum(ours == "mhmoe-swiglu" for _, ours, _ in times) == 4


def test_run_writes_a_complete_report(tmp_path, capsys):
    output = tmp_path / "report.md"
    assert bench(*FP32, "--rivals", "gemm", "loop", "--no-memory", output=output) == 0
    report = text_of(output)
    assert f"report: {output}" in capsys.readouterr().out
    assert "(incomplete" not in report
    assert "| MH-MoE (ours) | GEMM bound |" in report and "| MH-MoE (ours) | plain autograd loop |" in report
    assert not list(tmp_path.glob(".*"))


def test_interrupted_run_leaves_what_it_has(tmp_path, monkeypatch):
    def interrupt(self, setting, first, second):
        if second == "loop":
            raise KeyboardInterrupt
        return time(self, setting, first, second)

    time = bench_layer.Run.time
    monkeypatch.setattr(bench_layer.Run, "time", interrupt)
    with pytest.raises(KeyboardInterrupt):
        bench(*FP32, "--rivals", "gemm", "loop", "--no-memory", output=tmp_path / "report.md")
    report = text_of(tmp_path / "report.md")
    assert "(incomplete" in report and "| MH-MoE (ours) | GEMM bound |" in report


def test_missing_rival_is_noted_and_torchscale_is_spared_long_batches(tmp_path, monkeypatch):
    missing = bench_layer.CONTENDERS["mixtral-grouped"]._replace(package="not_here")
    monkeypatch.setitem(bench_layer.CONTENDERS, "mixtral-grouped", missing)
    flags = [*SMALL, "--dtypes", "bf16", "--rivals", "gemm", "mixtral-grouped", "--no-memory"]
    assert bench(*flags, output=tmp_path / "report.md") == 0
    assert "grouped_mm was left out: pip install not_here" in text_of(tmp_path / "report.md")
    args = bench_layer.build_parser().parse_args(["--tokens", "4096", "8192", "--dtypes", "fp32"])
    jobs = plan(args, ["gemm", "torchscale"])
    assert [job[1].tokens for job in jobs if "torchscale" in job] == [4096, 4096]  # memory and time


@pytest.mark.parametrize(("flags", "message"), [
    (["--heads", "5"], "num_heads (5)"),
    (["--top-k", "9", "--experts", "8"], "top_k (9)"),
    (["--output", "report.txt"], "--output (report.txt) must end in .md"),
    (["--growth", "--tokens", "64"], "--tokens contradicts --growth"),
])  # fmt: skip
def test_bad_input_is_one_line_before_any_work(flags, message, capsys):
    assert bench(*flags) == 2
    out = capsys.readouterr().out.strip().splitlines()
    assert len(out) == 1 and out[0].startswith("layer: error:") and message in out[0]


@pytest.mark.slow
def test_memory_is_measured_in_fresh_processes(tmp_path):
    assert bench(*FP32, "--tokens", "512", "--rivals", "loop", output=tmp_path / "report.md") == 0
    report = text_of(tmp_path / "report.md")
    memory = report[report.index("## Peak memory") :].splitlines()
    rows = [line for line in memory if line.startswith("| D=32 H=2 E=4 K=2 F=48 T=512 fp32, 1 thread |")]
    assert len(rows) == 2 and all(float(row.split("|")[3]) > 0 for row in rows)
