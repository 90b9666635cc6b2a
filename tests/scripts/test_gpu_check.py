"""scripts/gpu_check.py without a GPU: its cases on the CPU and on meta, the bugs that they find, the verdicts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fairseq import options
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

import gpu_check
from gpu_check import DTYPES, FAMILIES, VARIANTS, Bench, build, check_layer, check_no_sync, grouped_products

from mhmoe_fairseq.moe import experts as experts_module


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path, device="cpu", size="tiny", updates=10, tokens=32, repeats=1)


def test_without_a_device_one_line_and_status_2():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, gpu_check.__file__], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "gpu_check: no CUDA device\n")


@pytest.mark.parametrize("precision", DTYPES)
def test_every_backend_gives_what_the_oracle_gives(bench, precision):
    assert "in 45 comparisons" in check_layer(bench, precision)  # 5 variants, 3 paddings, 3 backends


def without_gradient(y, fraction):
    return y * (1 - fraction) + (y * fraction).detach()


def without_last_row(y, plan):
    """The last real row as zeros."""
    return torch.where(torch.arange(len(y)).unsqueeze(1) == plan.offsets_E[-1] - 1, 0, y)


def with_unwritten_rows(y, plan):
    """Rows of padding as NaN."""
    return torch.where(torch.arange(len(y)).unsqueeze(1) >= plan.offsets_E[-1], torch.nan, y)


BUGS = {
    "an output": (lambda y, plan: y * 1.0001, ""),
    "a gradient": (lambda y, plan: y * 0.999 + (y * 0.001).detach(), "gradient of "),
    "a row": (without_last_row, ""),
    "unwritten rows": (with_unwritten_rows, "inf of "),
}


@pytest.mark.parametrize("backend", ["grouped", "blocked"])
@pytest.mark.parametrize("bug", BUGS)
def test_a_wrong_kernel_is_found(bench, monkeypatch, backend, bug):
    change, said = BUGS[bug]
    real = getattr(experts_module, f"{backend}_ffn")
    monkeypatch.setattr(experts_module, f"{backend}_ffn", lambda x, plan, *more: change(real(x, plan, *more), plan))
    monkeypatch.setattr(gpu_check, "VARIANTS", {"dropless": {}})
    with pytest.raises(AssertionError, match=f"largest error .*{said}.*{backend}, dropless"):
        check_layer(bench, "fp32")


def test_a_look_at_padding_is_found(bench, monkeypatch):
    real = gpu_check.MHMoELayer.forward

    def forward(self, x, mask):
        out = real(self, x, mask)
        return out._replace(hidden=out.hidden + 0 * x)

    monkeypatch.setattr(gpu_check.MHMoELayer, "forward", forward)
    with pytest.raises(AssertionError, match="inf of .* padding"):
        check_layer(bench, "fp32")


def test_other_experts_are_an_error_of_any_size():
    loads = {"experts' load": torch.tensor([1000.0, 1.0])}
    assert gpu_check.largest_error(loads, loads)[0] == 0
    assert gpu_check.largest_error({"experts' load": torch.tensor([1000.0, 0.0])}, loads)[0] == float("inf")


def test_only_a_backend_that_is_not_made_for_it_may_refuse(bench, monkeypatch):
    def refuse(*args):
        raise RuntimeError("not for this dtype")

    monkeypatch.setattr(experts_module, "grouped_ffn", refuse)
    assert "in 30 comparisons; grouped_mm refuses fp32 here" in check_layer(bench, "fp32")
    for precision in ("bf16", "autocast"):
        with pytest.raises(RuntimeError, match="not for this dtype"):
            check_layer(bench, precision)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=list(VARIANTS))
def test_rounding_changes_no_expert_and_one_is_idle(bench, fields):
    layer = build(bench, torch.float64, fields)
    x = gpu_check.sure_tokens(layer)
    loads = layer(x).stats.expert_load, layer.bfloat16()(x.bfloat16()).stats.expert_load
    assert loads[0].equal(loads[1]) and loads[0][-1] == 0 and x.shape == (2, 24, 64)


@pytest.mark.parametrize("device, count", [("cpu", 15), ("meta", 25)])
def test_no_host_read_on_shapes_or_values(bench, device, count):
    assert f"of {count} layers" in check_no_sync(bench._replace(device=device))


def test_a_host_read_is_found(bench, monkeypatch):
    real = experts_module.blocked_ffn
    monkeypatch.setattr(
        experts_module, "blocked_ffn", lambda x, plan, *more: real(x[: len(x) + int(plan.load()[0] * 0)], plan, *more)
    )
    with pytest.raises(RuntimeError, match="_local_scalar_dense reads a value on the host"):
        check_no_sync(bench)


def test_cuda_watches_and_is_released(bench, monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with pytest.raises(KeyError), gpu_check.host_reads_forbidden(bench._replace(device="cuda")):
        raise KeyError(*modes)
    assert modes == ["error", "default"]


def test_the_bound_has_the_layers_flops(bench):
    layer = build(bench, torch.bfloat16, {"embed_dim": 32, "expert_ffn_dim": 128})
    x = torch.randn(16, 32, dtype=torch.bfloat16, requires_grad=True)

    def grouped(a, b, *more, **named):  # two-dimensional factors have the rows as inner or outer size
        return 2 * a[-2] * a[-1] * b[-1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped}) as counter:
        grouped_products(layer.config, x, x)()
    router = layer.config.subtokens_per_token * layer.router.flops(layer.config)
    assert counter.get_total_flops() == 3 * 16 * (layer.config.flops_per_token() - router)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_cost_is_told(bench, device):
    assert "x grouped GEMM's" in gpu_check.check_cost(bench._replace(device=device), 64)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("device, backend", [("cpu", "gloo"), ("cuda", "nccl")])
def test_trainings_are_what_fairseq_takes(bench, family, device, backend):
    words = gpu_check.train_words(bench, family, "base", 7, ["--mhmoe-precision", "bf16"], device)
    args = options.parse_args_and_arch(options.get_training_parser(), words)
    assert (args.arch, args.max_update, args.distributed_backend) == (f"{family}_lm_base", 7, backend)
    assert args.cpu == (device == "cpu") and args.distributed_no_spawn and args.distributed_world_size == 1


def stub_training(monkeypatch, *runs):
    """Trainings with given losses (by update) in place of real ones; returns what was asked for."""
    asked, left = [], list(runs)

    def train(bench, family, size, updates, *flags, device=""):
        asked.append((family, size, updates, flags, device))
        return {update: {"loss": str(loss), "wps": "100", "wpb": "32"} for update, loss in left.pop(0).items()}

    monkeypatch.setattr(gpu_check, "train", train)
    return asked


@pytest.mark.parametrize("losses, falls", [
    ([9.0] * 5 + [8.6] * 5, True), ([9.0] * 5 + [8.8] * 5, False), ([9.0] * 5 + [float("nan")] * 5, False),
    ([9.0] * 5 + [8.0] * 4, False),
])  # fmt: skip
def test_a_loss_must_fall_to_the_last_update(bench, monkeypatch, losses, falls):
    stub_training(monkeypatch, dict(enumerate(losses, 1)))
    outcome = [gpu_check.run(bench, ["train-xmoe"], None)]
    assert outcome == [int(not falls)]


@pytest.mark.parametrize("start, devices", [("gpu", ["meta", "cpu"]), ("cpu", ["cpu", "meta"])])
@pytest.mark.parametrize("resumed, same", [
    ({11: 8.001, 12: 7.9}, True), ({11: 8.0, 12: 7.91}, False), ({1: 9.0, 11: 8.0, 12: 7.9}, False),
])  # fmt: skip
def test_a_resumed_training_goes_on_alike(bench, monkeypatch, start, devices, resumed, same):
    asked = stub_training(monkeypatch, {10: 8.1, 11: 8.0, 12: 7.9}, resumed)
    assert gpu_check.run(bench._replace(device="meta"), [f"resume-{start}"], None) == int(not same)
    assert [device for *_, device in asked] == devices


def test_a_run_goes_on_after_a_failure_and_reports(bench, monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError("device-side assert\nsecond line")

    monkeypatch.setattr(gpu_check, "largest_error", fail)
    output = bench.folder / "report.md"
    assert gpu_check.run(bench, ["layer-fp32", "layer-bf16", "no-sync"], output) == 1
    said = capsys.readouterr().out
    assert [line.split()[:2] for line in said.splitlines()] == [
        ["FAILED", "layer-fp32:"], ["FAILED", "layer-bf16:"], ["ok", "no-sync:"],
    ]  # fmt: skip
    report = output.read_text(encoding="utf-8")
    assert "RuntimeError: device-side assert [" in said and "# GPU check" in report and "Device: cpu." in report
    assert report.count("**missed**: layer-") == 2 and "- met: no-sync (forward and backward" in report


@pytest.mark.parametrize("words, names, report", [
    ([], list(gpu_check.cases()), "-nvidia-h200-gpu-check.md"),
    (["--only", "no-sync"], ["no-sync"], None),
    (["--only", "no-sync", "--output", "here.md"], ["no-sync"], "here.md"),
])  # fmt: skip
def test_what_is_run_and_where_its_report_goes(monkeypatch, words, names, report):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(gpu_check, "run", lambda *given: given)
    bench, given, output = gpu_check.main(words)
    assert (bench.device, given) == ("cuda", names)
    assert output is None if report is None else str(output).endswith(report)


@pytest.mark.slow
def test_real_trainings(bench, capsys):
    names = ["train-mhmoe", "resume-gpu", "speed-dense"]
    assert gpu_check.run(bench._replace(updates=20), names, None) == 0, capsys.readouterr().out


@pytest.mark.slow
def test_a_training_that_fails_or_hangs_is_an_error(bench):
    with pytest.raises(RuntimeError, match="dense_lm_tiny, --cpu, ended with 1: .*Error"):
        gpu_check.train(bench, "dense", "tiny", 2, "--restore-file", "nowhere.pt", "--optimizer", "none")
    with pytest.raises(RuntimeError, match="nothing after 1 s"):
        gpu_check.train(bench._replace(time_limit=1.0), "dense", "tiny", 2)
