"""What only a GPU can tell, in one command: is the layer right, does it make the host wait, does it train, how fast."""

import argparse
import contextlib
import copy
import datetime
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from bench.console import ROOT, write_report
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mhmoe_fairseq.moe import MHMoEConfig, MHMoELayer
from mhmoe_fairseq.moe.experts import grouped_mm_supports
from mhmoe_fairseq.moe.heads import split_heads

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "autocast": torch.float32}
# Largest max|a - b| / max|b| of a tensor. bf16 has 8 binary digits, fp16 11, fp32 24 (TF32 is off).
TOLERANCES = {"fp32": 1e-5, "bf16": 3e-2, "fp16": 4e-3, "autocast": 3e-2}
BACKENDS = ("auto", "grouped", "blocked")
VARIANTS = {
    "dropless": {},
    "capacity": {"routing": "capacity", "capacity_factor": 0.5},
    "one choice": {"top_k": 1},
    "one head": {"num_heads": 1},
    "SwiGLU": {"activation": "swiglu", "expert_layernorm": True, "router": "linear", "shared_expert_dim": 32},
}
PADDED = {"no padding": 0, "padding": 8, "only padding": 24}  # of the 24 positions of 2 rows
HOST_READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::item", "aten::masked_select", "aten::is_nonzero"}
SPARSE = ("--moe-expert-count", "8", "--moe-top-k", "2")
FAMILIES = {"dense": (), "xmoe": SPARSE, "mhmoe": (*SPARSE, "--mhmoe-heads-number", "4", "--mhmoe-budget", "flops")}
LEAST_FALL = 0.3  # bits, of the mean loss of 5 updates
GRACE = 10  # seconds for torchrun to end its rank
LOSS_TOLERANCE = 0.003  # bits; fairseq's log rounds to 0.001
EPILOG = """\
A run of all cases takes at most 8 minutes and writes docs/benchmarks/<date>-<gpu>-gpu-check.md. It goes on after a
failure; the exit status is then 1. Without a CUDA device it is 2.

  python scripts/gpu_check.py
  python scripts/gpu_check.py --only layer-bf16 no-sync --output report.md
"""


class Bench(NamedTuple):
    """Where the cases run, with what sizes; tests have other devices and smaller sizes."""

    folder: Path
    device: str = "cuda"
    size: str = "base"  # of the models whose speed is measured
    updates: int = 50
    tokens: int = 4096
    repeats: int = 10
    time_limit: float = 150.0  # seconds of one training

    @property
    def on_cuda(self) -> bool:
        return self.device == "cuda" and torch.cuda.is_available()


def require(kept: bool, said: str) -> str:
    """Returns what was measured, ``said``; an AssertionError says it unless the promise was kept."""
    if not kept:
        raise AssertionError(said)
    return said


def build(bench: Bench, dtype: torch.dtype, fields: dict, backend: str = "auto") -> MHMoELayer:
    """A small layer with weights of ``dtype``, always the same."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 64, "num_heads": 4, "num_experts": 8, "expert_ffn_dim": 96}
    return MHMoELayer(MHMoEConfig(**{**sizes, **fields}), backend=backend).to(bench.device, dtype)


def takes(layer: MHMoELayer, dtype: torch.dtype, device: str) -> bool:
    """Whether the layer's backend is made for ``dtype`` on a device."""
    widths = (layer.config.subtoken_dim, layer.config.expert_ffn_dim)
    return layer.experts.backend != "grouped" or grouped_mm_supports(
        torch.device(device), dtype, widths, layer.experts.fc1_weight.size(0)
    )


def sure_tokens(layer: MHMoELayer) -> Tensor:
    """Tokens ``(2, 24, D)`` exact in any dtype, whose experts no rounding changes; the last expert is idle."""
    config, k = layer.config, layer.config.top_k
    pool = torch.randn(16384, config.embed_dim, generator=torch.Generator().manual_seed(1)).bfloat16().double()
    with torch.no_grad():
        heads = pool if layer.head_projection is None else layer.head_projection(pool)
        logits = layer.router(split_heads(heads, config.subtokens_per_token))
    values, experts = logits.view(len(pool), -1, config.num_experts).sort(descending=True)
    gaps = (values[..., :k] - values[..., 1 : k + 1]).flatten(1).amin(1)
    busy = (experts[..., :k] != config.num_experts - 1).flatten(1).all(1)
    return pool[busy & (gaps > 0.1 * logits.std())][:48].view(2, 24, -1)


def results(layer: MHMoELayer, x: Tensor, mask: Tensor, weigh: Tensor, autocast: bool = False) -> dict[str, Tensor]:
    """Output, losses, loads and the gradients of a weighted sum of the former, by name."""
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type if autocast else "cpu", torch.bfloat16, enabled=autocast):
        out = layer(x, mask)
    total = (out.hidden.to(weigh.dtype) * weigh).sum() + 100 * (out.balance_loss + out.z_loss)
    names, parameters = zip(*layer.named_parameters())
    gradients = torch.autograd.grad(total, [x, *parameters])
    found = {"output": out.hidden, "balance loss": out.balance_loss, "z-loss": out.z_loss}
    found |= {"experts' load": out.stats.expert_load, "dropped": out.stats.dropped}
    return found | {f"gradient of {name}": gradient for name, gradient in zip(("input", *names), gradients)}


def largest_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest max|a - b| / max|b| (absolute where b is zero) and its tensor; infinite for NaN or other experts."""
    worst = (0.0, "")
    for name, reference in expected.items():
        difference = (got[name].double().cpu() - reference).detach().abs().max()
        error = float(difference / (reference.detach().abs().max() or 1))
        wrong = error != error or (error > 0 and name in ("experts' load", "dropped"))
        worst = max(worst, (float("inf") if wrong else error, name))
    return worst


def check_layer(bench: Bench, precision: str) -> str:
    """Compares all backends with the CPU's loop in float64, on the same (rounded) weights and inputs."""
    dtype, autocast, worst, count, refused = DTYPES[precision], precision == "autocast", (0.0, ""), 0, ""
    for variant, fields in VARIANTS.items():
        layer = build(bench, dtype, fields)
        oracle = copy.deepcopy(layer).to("cpu", torch.float64)
        tokens = sure_tokens(oracle)
        weigh = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(2))
        for (padding, padded), backend in itertools.product(PADDED.items(), BACKENDS):
            mask = (torch.arange(24) >= 24 - padded).expand(2, 24)
            x = tokens.masked_fill(mask.unsqueeze(2), float("nan"))
            layer.experts.backend = backend
            given = (x.to(bench.device, dtype), mask.to(bench.device), weigh.to(bench.device))
            try:
                got = results(layer, *given, autocast)
            except RuntimeError:
                if takes(layer, torch.bfloat16 if autocast else dtype, bench.device):
                    raise
                refused = f"; grouped_mm refuses {precision} here, where auto never takes it"
                continue
            error, name = largest_error(got, results(oracle, x, mask, weigh.double()))
            worst, count = max(worst, (error, f"{name}, {backend}, {variant}, {padding}")), count + 1
    said = f"largest error {worst[0]:.1e} of {TOLERANCES[precision]:.0e} ({worst[1]}) in {count} comparisons{refused}"
    return require(worst[0] <= TOLERANCES[precision], said)


class NoHostReads(TorchDispatchMode):
    """While open, an operation that needs a value on the host is an error, on any device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in HOST_READS:
            raise RuntimeError(f"{func._schema.name} reads a value on the host")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def host_reads_forbidden(bench: Bench) -> Iterator[None]:
    """While open, the host must not wait for the device; CUDA itself watches where it is."""
    if bench.on_cuda:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        with NoHostReads():
            yield
    finally:
        if bench.on_cuda:
            torch.cuda.set_sync_debug_mode("default")


def check_no_sync(bench: Bench) -> str:
    """Forward and backward of all variants and backends; "auto" not on a CPU, whose loop reads bounds."""
    count = 0
    backends = [name for name in BACKENDS if (name, bench.device) != ("auto", "cpu")]
    for backend, dtype, fields in itertools.product(backends, (torch.bfloat16, torch.float32), VARIANTS.values()):
        layer = build(bench, dtype, fields, backend)
        if takes(layer, dtype, bench.device):
            x = torch.randn(2, 24, 64, device=bench.device, dtype=dtype)
            mask = (torch.arange(24, device=bench.device) >= 16).expand(2, 24)
            results(layer, x, mask, x)  # a kernel's first use may wait
            with host_reads_forbidden(bench):
                results(layer, x, mask, x)
            count += 1
    return f"none in forward and backward of {count} layers"


def train_words(bench: Bench, family: str, size: str, updates: int, flags: Sequence[str], device: str) -> list[str]:
    """The command line of ``fairseq-train``; one rank with a process group, NCCL or on a CPU gloo."""
    length = "512" if size == "base" else "64"
    return [
        str(bench.folder / length), "--user-dir", str(ROOT / "mhmoe_fairseq"), "--task", "mhmoe_language_modeling",
        "--arch", f"{family}_lm_{size}", *FAMILIES[family], "--dropout", "0", "--criterion", "moe_cross_entropy",
        "--optimizer", "mhmoe_adam", "--lr", "2e-3", "--clip-norm", "1", "--max-update", str(updates), "--seed", "1",
        "--tokens-per-sample", length, "--batch-size", "16", "--num-workers", "0", "--disable-validation",
        "--log-format", "json", "--log-interval", "1", "--save-dir", str(bench.folder / "saved"), *flags,
        # fairseq looks at torchrun's environment by itself only for several ranks
        "--distributed-init-method", "env://", "--distributed-world-size", "1", "--distributed-no-spawn",
        "--distributed-backend", *(("gloo", "--cpu") if device == "cpu" else ("nccl",)),
    ]  # fmt: skip


def train(bench: Bench, family: str, size: str, updates: int, *flags: str, device: str = "") -> dict[int, dict]:
    """Trains on synthetic words, as ``torchrun --nproc_per_node 1`` does; returns each update's log.

    Raises:
        RuntimeError: it failed, took too long or had no process group.
    """
    from bench.training import write_zipf_data  # here, because fairseq talks when it is imported

    words = train_words(bench, family, size, updates, flags, device or bench.device)
    if not (data := Path(words[0])).exists():
        data.mkdir()
        # an epoch is longer than any of the trainings
        sizes = {"vocab": 8000 if size == "base" else 1000, "sentences": 256}
        write_zipf_data(data, argparse.Namespace(**sizes, tokens_per_sample=int(data.name)))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", "-m", "fairseq_cli.train")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if "--cpu" in words else {}
    with open(bench.folder / "output.txt", "w+", errors="replace") as out:
        with subprocess.Popen([sys.executable, *launcher, *words], stdout=out, stderr=out, env=environment) as process:
            try:
                status = process.wait(bench.time_limit)
            except subprocess.TimeoutExpired:
                process.terminate()  # torchrun ends its rank
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
                process.kill()
                status = f"nothing after {bench.time_limit:.0f} s"
        out.seek(0)
        text = out.read()
    if status or "initialized host" not in text:
        reason = [*re.findall(r"^.*Error\b.*$", text, re.MULTILINE), "no error"][0]
        raise RuntimeError(f"{family}_lm_{size}, {words[-1]}, ended with {status}: {reason}")
    logs = map(json.loads, re.findall(r"train_inner \| (\{.*\})", text))
    return {int(log["num_updates"]): log for log in logs}


def check_training(bench: Bench, family: str) -> str:
    """Trains a tiny model in bf16: the loss falls."""
    logs = train(bench, family, "tiny", bench.updates, "--mhmoe-precision", "bf16", "--no-save")
    losses = [float(log["loss"]) for log in logs.values()]
    first, last = statistics.fmean(losses[:5]), statistics.fmean(losses[-5:])
    said = f"{len(losses)} updates, loss {first:.3f} at first, {last:.3f} bits at last"
    return require(len(losses) == bench.updates and last <= first - LEAST_FALL, said)


def check_resume(bench: Bench, start: str) -> str:
    """Trains 12 updates on the GPU or the CPU, and the last two again on the other from the checkpoint of the tenth."""
    first, second = (bench.device, "cpu") if start == "gpu" else ("cpu", bench.device)
    saved = str(bench.folder / f"saved-on-{start}")
    saving = ("--save-dir", saved, "--save-interval-updates", "10", "--mhmoe-precision", "fp32")
    whole = train(bench, "mhmoe", "tiny", 12, *saving, device=first)
    restoring = ("--no-save", "--restore-file", f"{saved}/checkpoint_1_10.pt", "--mhmoe-precision", "fp32")
    resumed = train(bench, "mhmoe", "tiny", 12, *restoring, device=second)
    losses = [[float(logs[update]["loss"]) for update in (11, 12)] for logs in (whole, resumed)]
    said = f"{losses[0]} bits on {first} at updates 11 and 12, {losses[1]} resumed on {second}"
    return require(min(resumed) == 11 and all(abs(a - b) <= LOSS_TOLERANCE for a, b in zip(*losses)), said)


def measure(bench: Bench, step: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds (median) and the peak MiB beyond what is there before; without CUDA no MiB."""
    times, peak = [], 0.0
    for _ in range(bench.repeats + 2):
        if bench.on_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        else:
            began = time.perf_counter()
            step()
            times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times[2:]), peak


def grouped_products(config: MHMoEConfig, x: Tensor, grad: Tensor) -> Callable[[], object]:
    """Forward and backward of the layer's products alone: grouped, with equal rows, and the two projections."""
    experts, inner, outer = config.num_experts, config.expert_ffn_dim, config.subtoken_dim
    rows = x.numel() // outer * config.top_k
    shapes = [(rows, outer), (experts, outer, inner), (experts, inner, outer), *[(x.size(1), x.size(1))] * 2]
    tensors = [torch.randn(shape, device=x.device, dtype=x.dtype, requires_grad=True) for shape in shapes]
    ends = torch.arange(1, experts + 1, device=x.device, dtype=torch.int32) * (rows // experts)

    def step() -> object:
        inputs, fc1, fc2, head, merge = tensors
        found = F.grouped_mm(F.grouped_mm(inputs, fc1, offs=ends), fc2, offs=ends), F.linear(F.linear(x, head), merge)
        return torch.autograd.grad(found, [x, *tensors], [torch.ones_like(inputs), grad])

    return step


def check_cost(bench: Bench, width: int) -> str:
    """Time and memory of forward and backward, and of grouped products with the layer's FLOPs."""
    layer = build(bench, torch.bfloat16, {"embed_dim": width, "expert_ffn_dim": 4 * width})
    shape, kind = (bench.tokens, width), {"device": bench.device, "dtype": torch.bfloat16}
    x, grad = torch.randn(shape, **kind, requires_grad=True), torch.randn(shape, **kind)

    def step() -> object:
        out = layer(x)
        return torch.autograd.grad([out.hidden, out.balance_loss], [x, *layer.parameters()], [grad, None])

    (ours, memory), (least, bound) = measure(bench, step), measure(bench, grouped_products(layer.config, x, grad))
    speed = 3 * bench.tokens * layer.config.flops_per_token() / ours / 1e9
    times = f"{ours:.2f} ms, {ours / least:.2f}x grouped GEMM's {least:.2f} ms, {speed:.1f} TFLOP/s"
    return f"{times}; {memory:.0f} MiB, grouped GEMM's {bound:.0f} (T={bench.tokens}, H=4, k=2, E=8, F={4 * width})"


def check_speed(bench: Bench, family: str) -> str:
    """Tokens/s in training, the median of all updates but the first fifth."""
    logs = train(bench, family, bench.size, 25, "--mhmoe-precision", "bf16", "--no-save")
    speeds = [float(log["wps"]) for update, log in logs.items() if update > 5]
    return f"{statistics.median(speeds):,.0f} tokens/s, updates of {float(logs[25]['wpb']):.0f} tokens"


def cases() -> dict[str, tuple[Callable[[Bench], str], str]]:
    """What can be checked, by name: the function that measures it, and what it shows."""

    def each(kind: str, case: Callable, argument: str, values: Iterable, shows: str) -> dict:
        return {f"{kind}-{value}": (partial(case, **{argument: value}), shows.format(value)) for value in values}

    return {
        **each("layer", check_layer, "precision", DTYPES, "all backends give what the CPU gives, {}"),
        "no-sync": (check_no_sync, "forward and backward never make the host wait"),
        **each("train", check_training, "family", FAMILIES, "a tiny {} model learns, in bf16 and with NCCL"),
        **each("resume", check_resume, "start", ("gpu", "cpu"), "training that began on the {} goes on on the other"),
        **each("cost", check_cost, "width", (768, 4096), "the layer's time and memory, bf16, D={}"),
        **each("speed", check_speed, "family", FAMILIES, "tokens/s of {}_lm_base in training, bf16"),
    }


def run(bench: Bench, names: Sequence[str], output: Path | None) -> int:
    """Runs cases, the next whatever becomes of the last; rewrites the report after each; returns the exit status."""
    found: list[tuple[str, bool]] = []
    for name, (case, shows) in cases().items():
        if name not in names:
            continue
        began, kept = time.perf_counter(), True
        try:
            said = case(bench)
        except AssertionError as error:
            kept, said = False, str(error)
        except Exception as error:  # another fault of ours, or the machine's: the other cases may tell which
            kept, said = False, f"{type(error).__name__}: {error}".partition("\n")[0]
        said = f"{said} [{time.perf_counter() - began:.0f} s]"
        print("ok    " if kept else "FAILED", f"{name}: {said}", flush=True)
        found.append((f"{name} ({shows}): {said}", kept))
        torch.cuda.empty_cache()  # the next may be another process
        if output is not None:
            how = argparse.Namespace(threads=torch.get_num_threads(), clock=time.perf_counter)
            write_report(output, "GPU check", how, found, {"Device": device_text(bench)})
    return int(not all(kept for _, kept in found))


def device_text(bench: Bench) -> str:
    if not bench.on_cuda:
        return f"Device: {bench.device}."
    gpu = torch.cuda.get_device_properties(0)
    capability = f"compute capability {gpu.major}.{gpu.minor}, CUDA {torch.version.cuda}"
    return f"GPU: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {capability}. TF32 is off."


def main(words: Sequence[str] | None = None) -> int:
    listing = "\n".join(f"  {name:15} {shows}" for name, (_, shows) in cases().items())
    parser = argparse.ArgumentParser(description=f"{__doc__}\n\ncases:\n{listing}", epilog=EPILOG)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    names = list(cases())
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help="some of the cases")
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="where the report goes")
    args = parser.parse_args(words)
    if not torch.cuda.is_available():
        print("gpu_check: no CUDA device", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    if args.output is None and args.only == names:
        gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
        args.output = ROOT / "docs" / "benchmarks" / f"{datetime.date.today().isoformat()}-{gpu}-gpu-check.md"
    with tempfile.TemporaryDirectory() as folder:
        return run(Bench(Path(folder)), args.only, args.output)


if __name__ == "__main__":
    sys.exit(main())
