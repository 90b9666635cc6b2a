"""scripts/bench_model.py: the models, the tokens, the verdicts, the reports."""

import re
import sys
from pathlib import Path

import pytest
import torch
from fairseq.data import data_utils

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

from bench import model as bench_model
from bench.timing import Pairs
from bench.training import Training, count, flags_of, write_zipf_data

TINY = ["--size", "tiny", "--tokens-per-sample", "16", "--vocab", "50", "--pairs", "1", "--updates", "1"]


def arguments(*flags):
    return bench_model.build_parser().parse_args([*TINY, *flags])


def test_flags_are_what_a_user_types(tmp_path):
    args = arguments("--sentences", "4")
    assert flags_of("dense", args)[:4] == ["--arch", "dense_lm_tiny", "--mhmoe-precision", "fp32"]
    expected = "--moe-expert-count 8 --moe-top-k 2 --mhmoe-heads-number 4 --mhmoe-budget flops"
    assert expected in " ".join(flags_of("mhmoe-flops", args))
    data = write_zipf_data(tmp_path, args)
    dense, flops = (count(data, name, args) for name in ("dense", "mhmoe-flops"))
    assert dense.moe is None and dense.moe_layers == 0
    assert flops.moe.num_heads == 4 and flops.moe.num_experts > 8 and flops.moe_layers == 2


def test_synthetic_words_follow_zipf(tmp_path):
    data = write_zipf_data(tmp_path, arguments("--sentences", "200"))
    dataset = data_utils.load_indexed_dataset(f"{data}/train")
    assert {len(dataset[index]) for index in range(len(dataset))} == {16}
    counts = torch.bincount(torch.cat([dataset[index] for index in range(len(dataset))]))
    first = 4  # after fairseq's special symbols
    assert counts[:first].sum() == 0
    assert counts[first] / counts[first + 10] == pytest.approx((10 + 2.7) / 2.7, rel=0.25)


def duels(seconds: float) -> dict[str, bench_model.Duel]:
    run = Training(1.0, 9.0, 1.0, {})
    return {"mhmoe-flops": bench_model.Duel(Pairs((1.0,) * 7, (seconds,) * 7), run, run)}


@pytest.mark.parametrize("flags, limit", [([], 0.95), (["--ranks", "2"], 0.85)])
def test_verdicts_are_about_tokens_per_second(flags, limit):
    args = bench_model.build_parser().parse_args(flags)
    for seconds, met in ((limit + 0.01, True), (limit - 0.01, False)):
        [(line, is_met)] = bench_model.decide(duels(seconds), args)
        assert is_met == met and f"{seconds:.3f}" in line
    assert flags or bench_model.decide(duels(1.0), arguments()) == []  # the target is about the default setting


def test_different_losses_stop_the_comparison():
    bench_model.check_same(9.0, 9.0001)
    with pytest.raises(RuntimeError, match="9.0000 bits on the ranks and 9.1000 in one process"):
        bench_model.check_same(9.0, 9.1)


@pytest.mark.parametrize("flags, message", [
    (["--ranks", "2", "--sentences", "3"], "--sentences (3) must be a multiple of --ranks (2)"),
    (["--ranks", "2", "--threads", "3"], "--threads (3) must be a multiple of --ranks (2)"),
    (["--ranks", "2", "--quick"], "--ranks (2) contradicts --quick"),
    (["--output", "report.txt"], "must end in .md"),
    (["--quick", "--data", "nothing"], "nothing"),
])  # fmt: skip
def test_bad_flags_are_one_line(flags, message, capsys):
    assert bench_model.main([*TINY, *flags]) == 2
    assert re.search(r"^model: error: .*" + re.escape(message), capsys.readouterr().out.strip().splitlines()[-1])


@pytest.mark.slow
def test_quick_training_run_writes_a_report(tmp_path, capsys):
    output = tmp_path / "report.md"
    assert bench_model.main([*TINY, "--quick", "--sentences", "1", "--output", str(output)]) == 0
    report = re.sub(" +", " ", output.read_text(encoding="utf-8"))
    assert "| MH-MoE, budget flops |" in report and "| X-MoE |" in report and "--mhmoe-budget flops" in report
    (products,) = re.findall(r"^\| MH-MoE, budget flops \|((?: -?[0-9.]+ \|){4})$", report, re.MULTILINE)
    assert all(float(value) > 0 for value in products.strip(" |").split("|")[:3])  # so small, the last is noise
    assert f"report: {output}" in capsys.readouterr().out


@pytest.mark.slow
def test_parallel_run_moves_the_rows_of_the_plan(tmp_path):
    output = tmp_path / "report.md"
    flags = ["--ranks", "2", "--models", "mhmoe-params", "--sentences", "4"]
    assert bench_model.main([*TINY, *flags, "--output", str(output)]) == 0
    report = re.sub(" +", " ", output.read_text(encoding="utf-8"))
    assert re.search(r"\| logged \| (\d+) \|.*\n\| plan, even routing \| \1 \|", report)
