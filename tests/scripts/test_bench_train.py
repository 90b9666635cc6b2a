"""scripts/bench_train.py: the models it builds, the tokens it draws, its report."""

import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

import bench_train
from _bench.timing import Pairs
from _bench.train_report import TrainResults, verdict
from _bench.training import Training, TrainingSetting

TINY = TrainingSetting(size="tiny", sentences=2, tokens_per_sample=16, vocab_size=50)


def test_flags_are_what_a_user_types():
    assert TINY.flags("dense") == ["--arch", "dense_lm_tiny", "--mhmoe-precision", "fp32"]
    expected = "--moe-expert-count 8 --moe-top-k 2 --mhmoe-heads-number 4 --mhmoe-budget flops"
    assert " ".join(TINY.flags("mhmoe-flops")).endswith(expected)
    with pytest.raises(ValueError, match=r"model \(gpt\) must be one of"):
        TINY.flags("gpt")


def test_an_update_trains_every_parameter():
    training = Training("mhmoe-flops", TINY)
    assert training.moe().num_heads == 4 and training.moe().num_experts > 8
    before = [parameter.detach().clone() for parameter in training.model.parameters()]
    for _ in range(8):
        training()
    moved = [not torch.equal(old, new) for old, new in zip(before, training.model.parameters())]
    assert all(moved)
    assert len(training.tensors()) >= 3 * len(before)  # weights and Adam's two moments


def test_synthetic_words_follow_zipf():
    training = Training("dense", TINY)
    assert training.moe() is None
    words = torch.cat([next(training.batches)["target"].flatten() for _ in range(200)])
    counts = torch.bincount(words)
    first = 4  # after fairseq's special symbols
    assert counts[:first].sum() == 0
    assert counts[first] / counts[first + 10] == pytest.approx((10 + 2.7) / 2.7, rel=0.25)


def test_verdict_speaks_of_the_promised_setting_only():
    results = TrainResults(pairs={"mhmoe-flops": Pairs((1.0,) * 7, (0.96,) * 7)})
    line, met = verdict(results, TrainingSetting())
    assert met and "0.960" in line
    assert verdict(TrainResults(pairs={"mhmoe-flops": Pairs((1.0,) * 7, (0.94,) * 7)}), TrainingSetting())[1] is False
    assert verdict(results, TINY) is None


def test_quick_run_writes_a_report(tmp_path, capsys):
    output = tmp_path / "report.md"
    flags = ["--quick", "--size", "tiny", "--sentences", "1", "--tokens-per-sample", "16", "--vocab", "50"]
    assert bench_train.main([*flags, "--pairs", "1", "--threads", "1", "--output", str(output)]) == 0
    report = output.read_text(encoding="utf-8")
    assert "| MH-MoE, budget flops |" in report and "| X-MoE |" in report
    assert "--mhmoe-budget flops" in report
    (products,) = re.findall(r"^\| MH-MoE, budget flops \|((?: [0-9.]+ \|){4})$", report, re.MULTILINE)
    ours, theirs, ratio, limit = map(float, products.strip(" |").split("|"))
    assert ours > 0 and theirs > 0 and ratio > 0 and limit > 0
    assert f"report: {output}" in capsys.readouterr().out


def test_missing_data_is_one_line(tmp_path, capsys):
    missing = str(tmp_path / "nothing")
    assert bench_train.main(["--quick", "--size", "tiny", "--data", missing, "--threads", "1"]) == 2
    assert "bench_train: error:" in capsys.readouterr().out
