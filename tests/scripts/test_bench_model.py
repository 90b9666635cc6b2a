"""scripts/bench/model.py: contenders, tokens, steps by turns, verdicts, reports."""

import argparse
import re
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fairseq.data import data_utils

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

from bench import console
from bench import model as bench_model
from bench.model import Duel, Results, decide, fighters_of
from bench.timing import Pairs
from bench.training import (
    PREFIX,
    STEPS,
    UPDATES,
    Contender,
    Steps,
    Training,
    count,
    flags_of,
    model_options,
    write_zipf_data,
)
from language_models import small_dictionary, small_model

TINY = ["--size", "tiny", "--tokens-per-sample", "16", "--vocab", "50", "--pairs", "1", "--threads", "1"]


def bench(*flags):
    return console.run_benchmark(bench_model.run, bench_model.build_parser(), [*TINY, *flags])


def arguments(*flags):
    return bench_model.build_parser().parse_args([*TINY, *flags])


@pytest.mark.parametrize(("text", "expected", "written"), [
    ("xmoe", Contender("xmoe"), "xmoe:fp32"),
    ("mhmoe-flops:bf16", Contender("mhmoe-flops", "bf16"), "mhmoe-flops:bf16"),
    ("dense:adam:2", Contender("dense", "fp32", "adam", 2), "dense:fp32:adam:2"),
    ("stock", Contender("stock", "fp32", "adam"), "stock:fp32:adam"),
])  # fmt: skip
def test_a_contender_is_written_as_it_is_read(text, expected, written):
    assert Contender.parse(text) == expected == Contender.parse(written) and str(expected) == written


@pytest.mark.parametrize(("text", "message"), [
    ("moe/xmoe", "moe in moe must be one of dense"), ("xmoe:fp8/xmoe", "fp8 in xmoe:fp8"),
    ("xmoe:0/xmoe", "0 in xmoe:0"), ("stock:bf16/xmoe", "stock fairseq trains here in fp32"), ("xmoe", "FIRST/SECOND"),
])  # fmt: skip
def test_an_unknown_contender_is_named(text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=re.escape(message)):
        fighters_of(text)


def test_flags_are_what_a_user_types():
    args = arguments("--sentences", "4")
    assert flags_of(Contender("dense"), args)[:4] == ["--arch", "dense_lm_tiny", "--mhmoe-precision", "fp32"]
    words = " ".join(flags_of(Contender("mhmoe-flops", "bf16", "adam", 2), args))
    assert "--moe-expert-count 8 --moe-top-k 2 --mhmoe-heads-number 4 --mhmoe-budget flops" in words
    assert "--optimizer adam" in words and "--batch-size 2" in words and "--mhmoe-precision bf16" in words
    dense, flops = (count(name, args, small_dictionary()) for name in ("dense", "mhmoe-flops"))
    assert dense.moe is None and dense.moe_layers == 0
    assert flops.moe.num_heads == 4 and flops.moe.num_experts > 8 and flops.moe_layers == 2


@pytest.mark.parametrize(("size", "width"), [("base", 4608), ("tiny", 768)])
def test_stock_fairseq_spends_the_flops_of_xmoe(size, width):
    args = arguments("--size", size)
    stock = model_options("stock", "fp32", args)
    dense, xmoe = (count(name, args, small_dictionary()) for name in ("dense", "xmoe"))
    layers, dim = stock["decoder_layers"], stock["decoder_embed_dim"]
    spends = dense.flops_per_token + 4 * layers * dim * (width - 4 * dim)
    assert stock["decoder_ffn_embed_dim"] == width and spends == pytest.approx(xmoe.flops_per_token, rel=0.005)


def test_synthetic_words_follow_zipf(tmp_path):
    data = write_zipf_data(tmp_path, arguments("--sentences", "200"))
    dataset = data_utils.load_indexed_dataset(f"{data}/train")
    assert len(dataset) == 200 * UPDATES and {len(dataset[index]) for index in range(len(dataset))} == {16}
    counts = torch.bincount(torch.cat([dataset[index] for index in range(len(dataset))]))
    first = 4  # after fairseq's special symbols
    assert counts[:first].sum() == 0
    assert counts[first] / counts[first + 10] == pytest.approx((10 + 2.7) / 2.7, rel=0.25)


def duel(names: str, speed: float, what: str = "update", rows: int = 0) -> Duel:
    return Duel(fighters_of(names), what, rows, 2, Pairs((1.0,) * 7, (speed,) * 7))


@pytest.mark.parametrize(("names", "flags", "limit"), [
    ("mhmoe-flops:bf16/mhmoe-flops:adam", [], 3.0),
    ("mhmoe-flops:bf16/mhmoe-flops:adam", ["--size", "small"], 1.8),
    ("mhmoe-flops/mhmoe-flops:adam", [], 1.4),
    ("mhmoe-flops/xmoe", [], 0.9),
    ("mhmoe-flops:bf16/xmoe:bf16", ["--size", "tiny"], 0.75),
    ("mhmoe-params:2/mhmoe-params", ["--size", "small", "--sentences", "16"], 0.85),
])  # fmt: skip
def test_verdicts_are_about_tokens_per_second(names, flags, limit):
    args = bench_model.build_parser().parse_args(flags)
    for speed, met in ((limit + 0.01, True), (limit - 0.01, False)):
        [(line, is_met)] = decide(Results([duel(names, speed)]), args)
        assert is_met == met and f"{speed:.3f}" in line


def test_other_settings_decide_nothing():
    assert not list(decide(Results([duel("mhmoe-flops/xmoe", 1.0)]), arguments("--experts", "4")))
    defaults = bench_model.build_parser().parse_args([])
    assert not list(decide(Results([duel("mhmoe-flops/xmoe:bf16", 1.0)]), defaults))


@pytest.mark.parametrize(("resident", "met"), [(75.0, True), (76.0, False), (None, True)])
def test_memory_counts_by_both_measures(resident, met):
    peaks = {
        Contender("mhmoe-flops", "bf16"): {"tensors": 70.0, "resident": resident},
        Contender("mhmoe-flops"): {"tensors": 100.0, "resident": 100.0},
    }
    [(line, is_met)] = decide(Results(peaks=peaks), arguments())
    assert is_met == met and "tensors 70 / 100 MiB = 0.70x" in line


def test_one_token_steps_have_a_target_at_small():
    args = bench_model.build_parser().parse_args(["--size", "small"])
    for speed, met in ((0.91, True), (0.89, False)):
        found = [duel("mhmoe-flops:bf16/xmoe:bf16", speed, what, 8) for what in ("decode", "score")]
        assert [is_met for _, is_met in decide(Results(found), args)] == [met]
    assert found[0].tokens(args) == 8 and found[1].tokens(args) == 8 * 512


def test_different_losses_stop_the_comparison(monkeypatch):
    closed = []

    def training(contender, *given):
        return SimpleNamespace(first_loss=9 + 0.1 * contender.ranks, close=lambda: closed.append(contender.ranks))

    monkeypatch.setattr(bench_model, "Training", training)
    with pytest.raises(RuntimeError, match="9.2000 bits on the ranks and 9.1000 in one process"):
        bench_model.fight(fighters_of("xmoe:2/xmoe"), 1, "", arguments(), Results(), None)
    assert closed == [1, 2]


@pytest.mark.parametrize(("flags", "message"), [
    (["--ranks", "2", "--sentences", "3"], "--sentences (3) must be a multiple of the ranks (2)"),
    (["--duels", "xmoe:2/xmoe", "--threads", "2", "3"], "--threads (2, 3) must be a multiple of the ranks (2)"),
    (["--ranks", "2", "--inference"], "--ranks (2) contradicts"),
    (["--output", "report.txt"], "must end in .md"),
    (["--data", "nothing"], "nothing"),
])  # fmt: skip
def test_bad_flags_are_one_line(flags, message, capsys):
    assert bench(*flags) == 2
    [line] = capsys.readouterr().out.strip().splitlines()
    assert line.startswith("model: error:") and message in line


def test_a_contender_that_dies_is_named(tmp_path):
    args = arguments("--heads", "3", "--vocab", "20")
    with pytest.raises(RuntimeError, match=r"mhmoe-flops:fp32: UserError: .*--mhmoe-heads-number \(3\)"):
        Training(Contender("mhmoe-flops"), write_zipf_data(tmp_path, args), args, 1)


@pytest.mark.slow
def test_duels_are_timed_measured_and_reported(tmp_path, capsys):
    output = tmp_path / "report.md"
    duels = ["--duels", "mhmoe-flops:bf16/xmoe", "xmoe/stock", "--sentences", "1", "--profile"]
    assert bench(*duels, "--output", str(output)) == 0
    report = re.sub(" +", " ", output.read_text(encoding="utf-8"))
    assert "| update | mhmoe-flops:bf16 | xmoe:fp32 | 1 |" in report and "| xmoe:fp32 | stock:fp32:adam | 1 |" in report
    models = re.findall(r"(?m)^\| (\S+) \| \S+ \| (?:[0-9.]+|as xmoe) \| [^|]+ \| [0-9]+ \| [0-9]+ \|$", report)
    assert models == ["mhmoe-flops:bf16", "xmoe:fp32", "stock:fp32:adam"]
    assert report.count("## Where the time goes: ") == 3 and "--mhmoe-budget flops" in report
    assert f"report: {output}" in capsys.readouterr().out


@pytest.mark.slow
def test_ranks_are_timed_beside_one_process(tmp_path):
    output = tmp_path / "report.md"
    assert bench("--threads", "2", "--ranks", "2", "--output", str(output)) == 0
    report = re.sub(" +", " ", output.read_text(encoding="utf-8"))
    assert "| update | mhmoe-params:fp32:2 | mhmoe-params:fp32 | 2 |" in report
    assert "mhmoe-params:fp32:2 has at least 0.85 of mhmoe-params:fp32's tokens/s" in report


@pytest.mark.slow
def test_updates_are_those_of_fairseq_train(tmp_path):
    """The same losses, update by update, as the command's log."""
    from console import run_console

    args = arguments()
    data, contender = write_zipf_data(tmp_path, args), Contender("mhmoe-flops")
    training = Training(contender, data, args, 1)
    losses = [training.first_loss]
    for _ in range(2):
        assert training.seconds() > 0
        losses.append(training.log["loss"])
    training.close()
    for end in ("bin", "idx"):  # fairseq 0.12.2 opens what it does not read
        shutil.copy(tmp_path / f"train.{end}", tmp_path / f"valid.{end}")
    package = str(Path(bench_model.__file__).resolve().parents[2] / "mhmoe_fairseq")
    log = run_console(
        "fairseq-train", data, "--user-dir", package, *flags_of(contender, args), "--seed", "1", "--max-update", "3",
        "--no-save", "--disable-validation", "--curriculum", "1", "--log-format", "json", "--log-interval", "1",
        cwd=tmp_path,
    )  # fmt: skip
    logged = [float(value) for value in re.findall(r'train_inner.*?"loss": "([0-9.]+)"', str(log))]
    assert logged == pytest.approx(losses, abs=2e-3)


@pytest.mark.slow
def test_models_in_use_are_timed(tmp_path):
    output = tmp_path / "report.md"
    assert (
        bench("--inference", "--duels", "mhmoe-flops/xmoe", "--tokens-per-sample", "64", "--output", str(output)) == 0
    )
    report = re.sub(" +", " ", output.read_text(encoding="utf-8"))
    assert all(f"| {step} | mhmoe-flops:fp32 | xmoe:fp32 |" in report for step in ("decode of 1", "score of 8"))


def test_one_token_steps_follow_a_prefix():
    steps = object.__new__(Steps)
    steps.trainer = SimpleNamespace(model=small_model().eval())
    steps.dictionary, steps.clock = small_dictionary(), iter(range(0, 300, 100)).__next__
    seen = []
    steps.trainer.model.decoder.register_forward_hook(lambda module, given, output: seen.append(output[0].shape))
    assert steps.decode(2) == (100 / STEPS, {})
    assert [(rows, length) for rows, length, _ in seen] == [(2, PREFIX), *[(2, 1)] * STEPS]


def test_cpu_time_of_ranks_is_added_up():
    training = object.__new__(Training)
    training.ask = lambda *request: [(1.0, {}), (3.0, {})]
    training.clock = time.process_time
    assert training.seconds() == 4.0
    training.clock = time.perf_counter
    assert training.seconds() == 3.0
