"""Time and peak memory of the MH-MoE layer against its bound and its rivals."""

import argparse
import gc
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import contenders
from bench.console import add_numbers, conclude, make_parser, positive, report_path, run_benchmark
from bench.contenders import DTYPES, NAMES, Setting, build
from bench.layer_report import Results, targets, write_layer_report, write_plot
from bench.memory import Peak, measure
from bench.timing import time_pairs

DESCRIPTION = """\
Measure the MH-MoE layer (forward and backward) against
  gemm             the time its matrix products alone take: the bound
  loop             the plain loop over experts, with autograd
  torchscale       TorchScale's static X-MoE on the same sub-tokens
  mixtral-grouped  Hugging Face's Mixtral block, grouped_mm, at equal FLOPs
  mixtral-eager    the same block with its loop over experts
and write a dated Markdown report with a plot. Before timing, our layer is
compared with the plain loop (values and all gradients, 1e-5 relative); a
difference stops the run. A rival whose package is missing is left out, and the
report says so.
"""
EPILOG = """\
examples:
  python scripts/bench/layer.py --quick
      the acceptance points only (about ten minutes): time at T=2048, E=8 and 32,
      and peak memory at T=2048, 4096, 8192, all in fp32
  python scripts/bench/layer.py
      the whole sweep: T=512..8192, E=8/32/128, fp32 and bf16 (an hour or two)
  python scripts/bench/layer.py --tokens 512 2048 --experts 8 --dtypes bf16 --rivals gemm loop
      a part of it

In the report "ours / rival" below 1 means that ours is faster; a wide range behind
it means that the machine was busy. docs/benchmarks/README.md says more.
"""
RIVALS = ("gemm", "loop", "torchscale", "mixtral-grouped", "mixtral-eager")
TORCHSCALE_MAX_TOKENS = 4096  # its dispatch tensors grow with T squared: 8 GB there
SIZES = {"embed-dim": "embed_dim", "heads": "num_heads", "top-k": "top_k", "ffn-dim": "ffn_dim"}


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(DESCRIPTION, EPILOG)
    parser.add_argument("--quick", action="store_true", help="only the points that the project's targets speak of")
    for name, default in (("tokens", [512, 1024, 2048, 4096, 8192]), ("experts", [8, 32, 128])):
        shown = f"{name} of a layer's step (default: {' '.join(map(str, default))})"
        parser.add_argument(f"--{name}", type=positive, nargs="+", default=default, metavar="N", help=shown)
    for name, known in (("dtypes", list(DTYPES)), ("rivals", list(RIVALS))):
        parser.add_argument(f"--{name}", nargs="+", choices=known, default=known, help="default: all")
    add_numbers(parser, {
        "embed-dim": (768, "model dimension D"), "heads": (4, "MH-MoE heads H"),
        "top-k": (2, "experts per sub-token K"), "ffn-dim": (3072, "inner width F of one expert"),
    })  # fmt: skip
    parser.add_argument("--no-memory", action="store_true", help="measure time only")
    return parser


def chosen_settings(args: argparse.Namespace) -> list[Setting]:
    """Returns every combination asked for; ValueError for a size that the layer refuses, or one beside ``--quick``."""
    for flag in ("tokens", "experts", "dtypes", *SIZES):
        name = flag.replace("-", "_")
        if args.quick and getattr(args, name) != build_parser().get_default(name):
            raise ValueError(f"--{flag} contradicts --quick, which measures the targets' own sizes")
    sizes = {field: getattr(args, flag.replace("-", "_")) for flag, field in SIZES.items()}
    return [Setting(t, e, dtype, **sizes) for dtype in args.dtypes for e in args.experts for t in args.tokens]


class Run:
    """Which measurements are made, and making them.

    Args:
        settings: what to measure; ``--quick`` has its own.
        rivals: contenders that can run here.
    """

    def __init__(self, args: argparse.Namespace, settings: Sequence[Setting], rivals: Sequence[str]) -> None:
        self.args, self.results = args, Results()
        self.path = report_path(args.output, "-quick" if args.quick else "")
        points = [Setting(2048, experts) for experts in (8, 32)] if args.quick else settings
        duels = [(setting, "mhmoe", name) for setting in points for name in rivals]
        if args.quick and "loop" in rivals:
            duels.append((Setting(4096, 8), "mhmoe", "loop"))
        if "mixtral-grouped" in rivals:  # like for like
            duels += [(setting, "mhmoe-swiglu", "mixtral-grouped") for setting in points]
        self.duels = [duel for duel in duels if runs_at(duel[2], duel[0])]
        # At the smallest number of experts, which hardly changes it.
        fewest = min(setting.num_experts for setting in settings)
        at_fewest = [setting for setting in settings if setting.num_experts == fewest]
        measured = [Setting(tokens, 8) for tokens in (2048, 4096, 8192)] if args.quick else at_fewest
        contenders = () if args.no_memory else [name for name in ("mhmoe", *rivals) if name != "gemm"]
        self.memory = [(setting, name) for setting in measured for name in contenders if runs_at(name, setting)]
        self.verified = [setting for setting in points if setting.dtype == "fp32"]
        middle = statistics.median_high({setting.tokens for setting in points})
        self.profiled = [setting for setting in points if setting.tokens == middle]

    def __call__(self) -> Results:
        """Verifies, measures, times, takes apart; the report is written after every part."""
        parts = [
            *((self.verify, (setting,)) for setting in self.verified),
            *((self.measure, job) for job in self.memory),
            *((self.time, duel) for duel in self.duels),
            *((self.take_apart, (setting,)) for setting in self.profiled),
        ]
        total = len(parts) + len(self.duels) * (self.args.pairs - 1)
        with tqdm(total=total, unit="step", dynamic_ncols=True, smoothing=0.1) as self.progress:
            for part, (setting, *names) in parts:
                self.progress.set_description_str(f"{part.__name__} {' / '.join(names)} {setting.label()}")
                part(setting, *names)
                if part != self.time:
                    self.progress.update()
                self.write(complete=False)
        if not write_plot(self.path.with_suffix(".png"), self.results):
            self.results.notes.append("No plot: matplotlib is not installed.")
        self.write(complete=True)
        return self.results

    def write(self, *, complete: bool) -> None:
        write_layer_report(self.path, self.results, threads=self.args.threads, pairs=self.args.pairs, complete=complete)

    def verify(self, setting: Setting) -> None:
        what = {"loop": f"our layer against the plain loop, {setting.label()}"}
        if any(rival.startswith("mixtral") for *_, rival in self.duels):
            what["mixtral-eager"] = f"our SwiGLU layer against Mixtral's block, {setting.label()}"
        for rival, label in what.items():
            self.results.errors[label] = contenders.check(contenders.errors_against(rival, setting), label)

    def measure(self, setting: Setting, name: str) -> None:
        try:
            self.results.memory[setting, name] = in_fresh_process(measure_memory, name, setting, self.args.threads)
        except RuntimeError as error:  # as when a rival needs more memory than the machine has
            if name.startswith("mhmoe"):
                raise
            self.results.notes.append(f"Memory of {NAMES[name]} at {setting.label()}: {error}")

    def time(self, setting: Setting, first: str, second: str) -> None:
        gc.collect()
        contenders = build(first, setting), build(second, setting)
        pairs = time_pairs(*contenders, pairs=self.args.pairs, after_pair=self.progress.update)
        self.results.times[setting, first, second] = pairs

    def take_apart(self, setting: Setting) -> None:
        self.results.breakdowns[setting.label()] = operator_times(build("mhmoe", setting))


def runs_at(name: str, setting: Setting) -> bool:
    return name != "torchscale" or setting.tokens <= TORCHSCALE_MAX_TOKENS


def operator_times(call: Callable[[], object], top: int = 8, repeats: int = 3) -> list[tuple[str, float, float]]:
    """Returns the operators that take most of a call: (name, milliseconds per call, share of all operators)."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(repeats):
            call()
    averages = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in averages)
    times = [(event.key, event.self_cpu_time_total) for event in averages[:top]]
    return [(name, time / 1e3 / repeats, time / total) for name, time in times]


def in_fresh_process(call: Callable[..., Peak], *arguments: object) -> Peak:
    """Returns what ``call`` returns in a process that does nothing else; RuntimeError for whatever ends it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(call, *arguments).result()
        except Exception as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error


def measure_memory(name: str, setting: Setting, threads: int) -> Peak:
    """Warms up on few tokens, then measures one full step."""
    torch.set_num_threads(threads)
    build(name, Setting(**{**vars(setting), "tokens": min(64, setting.tokens)}))()
    step = build(name, setting)
    return measure(step, step.clear, step.tensors)


def run(args: argparse.Namespace) -> int:
    settings = chosen_settings(args)  # first: bad sizes end the run before anything is said
    reasons = {name: contenders.unavailable(name) for name in args.rivals}
    planned = Run(args, settings, [name for name, reason in reasons.items() if reason is None])
    planned.results.notes += [f"{NAMES[name]} was left out: {reason}." for name, reason in reasons.items() if reason]
    for note in planned.results.notes:
        tqdm.write(note)
    return conclude(planned.path, list(targets(planned())), args.check)


def main(argv: Sequence[str] | None = None) -> int:
    return run_benchmark(run, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
