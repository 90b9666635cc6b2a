"""scripts/bench_train.py and bench_parallel.py: the models, the tokens, the verdicts, the reports."""

import re
import sys
from pathlib import Path

import pytest
import torch
from fairseq.data import data_utils

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

import bench_parallel
import bench_train
from _bench.timing import Pairs
from _bench.training import model_flags, shape_of, write_zipf_data

TINY = ["--size", "tiny", "--tokens-per-sample", "16", "--vocab", "50", "--pairs", "1", "--updates", "1"]


def arguments(*flags):
    return bench_train.build_parser().parse_args([*TINY, *flags])


def test_flags_are_what_a_user_types(tmp_path):
    args = arguments("--sentences", "4")
    assert model_flags("dense", args) == ["--arch", "dense_lm_tiny", "--mhmoe-precision", "fp32"]
    expected = "--moe-expert-count 8 --moe-top-k 2 --mhmoe-heads-number 4 --mhmoe-budget flops"
    assert " ".join(model_flags("mhmoe-flops", args)).endswith(expected)
    with pytest.raises(ValueError, match=r"model \(gpt\) must be one of"):
        model_flags("gpt", args)
    data = write_zipf_data(tmp_path, args)
    dense, flops = (shape_of(data, name, args) for name in ("dense", "mhmoe-flops"))
    assert dense.moe is None and dense.layers == 0
    assert flops.moe.num_heads == 4 and flops.moe.num_experts > 8 and flops.layers == 2


def test_synthetic_words_follow_zipf(tmp_path):
    data = write_zipf_data(tmp_path, arguments("--sentences", "200"))
    dataset = data_utils.load_indexed_dataset(f"{data}/train")
    assert {len(dataset[index]) for index in range(len(dataset))} == {16}
    counts = torch.bincount(torch.cat([dataset[index] for index in range(len(dataset))]))
    first = 4  # after fairseq's special symbols
    assert counts[:first].sum() == 0
    assert counts[first] / counts[first + 10] == pytest.approx((10 + 2.7) / 2.7, rel=0.25)


def test_verdicts_are_about_tokens_per_second_at_the_promised_setting():
    defaults = bench_train.build_parser().parse_args([])
    for seconds, met in ((0.96, True), (0.94, False)):
        results = bench_train.Results(pairs={"mhmoe-flops": Pairs((1.0,) * 7, (seconds,) * 7)})
        line, is_met = bench_train.decide(results, defaults)
        assert is_met == met and f"{seconds:.3f}" in line
    assert bench_train.decide(results, arguments()) is None
    args = bench_parallel.build_parser().parse_args([])
    assert bench_parallel.decide(Pairs((1.0,) * 7, (0.86,) * 7), args)[1]
    assert not bench_parallel.decide(Pairs((1.0,) * 7, (0.84,) * 7), args)[1]


def test_different_losses_stop_the_comparison():
    bench_parallel.check_same(9.0, 9.0001)
    with pytest.raises(RuntimeError, match="9.0000 bits on the ranks and 9.1000 in one process"):
        bench_parallel.check_same(9.0, 9.1)


@pytest.mark.parametrize("script, flags, message", [
    (bench_parallel, ["--sentences", "3"], "--sentences (3) must be a multiple of --ranks (2)"),
    (bench_parallel, ["--threads", "3"], "--threads (3) must be a multiple of --ranks (2)"),
    (bench_parallel, ["--output", "report.txt"], "must end in .md"),
    (bench_train, ["--quick", "--data", "nothing"], "nothing"),
])  # fmt: skip
def test_bad_flags_are_one_line(script, flags, message, capsys):
    assert script.main([*TINY, *flags]) == 2
    assert re.search(r"^bench_\w+: error: .*" + re.escape(message), capsys.readouterr().out.strip().splitlines()[-1])


@pytest.mark.slow
def test_quick_training_run_writes_a_report(tmp_path, capsys):
    output = tmp_path / "report.md"
    assert bench_train.main([*TINY, "--quick", "--sentences", "1", "--output", str(output)]) == 0
    report = output.read_text(encoding="utf-8")
    assert "| MH-MoE, budget flops |" in report and "| X-MoE |" in report and "--mhmoe-budget flops" in report
    (products,) = re.findall(r"^\| MH-MoE, budget flops \|((?: -?[0-9.]+ \|){4})$", report, re.MULTILINE)
    assert all(float(value) > 0 for value in products.strip(" |").split("|")[:3])  # so small, the last is noise
    assert f"report: {output}" in capsys.readouterr().out


@pytest.mark.slow
def test_parallel_run_moves_the_rows_of_the_plan(tmp_path):
    output = tmp_path / "report.md"
    assert bench_parallel.main([*TINY, "--sentences", "4", "--output", str(output)]) == 0
    report = output.read_text(encoding="utf-8")
    assert re.search(r"\| logged \| (\d+) \|.*\n\| plan, even routing \| \1 \|", report)
