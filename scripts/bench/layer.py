"""Time and peak memory of the MH-MoE layer against its bound and its rivals, and how its time grows."""

import argparse
import dataclasses
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
from bench.layer_report import POINTS, Results, targets, write_layer_report, write_plot
from bench.memory import Peak, measure
from bench.timing import operator_times, time_pairs

DESCRIPTION = """\
Measure the MH-MoE layer (forward and backward) against
  gemm             the time its matrix products alone take, in the same number format: the bound
  loop             the plain loop over experts, with autograd
  torchscale       TorchScale's static X-MoE on the same sub-tokens
  mixtral-grouped  Hugging Face's Mixtral block, grouped_mm, at equal FLOPs
  mixtral-eager    the same block with its loop over experts
and write a dated Markdown report with a plot. Before timing, our layer is
compared with the plain loop (values and all gradients, 1e-5 relative); a
difference stops the run. A rival whose package is missing is left out, and the
report says so. Without --sweep or --growth the settings are those that the
project's targets speak of: the bound at all six, the others at the first two.
"""
EPILOG = """\
examples:
  python scripts/bench/layer.py
      the targets' settings, and peak memory at T=2048, 4096, 8192 (about ten minutes)
  python scripts/bench/layer.py --threads 1 --cpu-time --dtypes bf16 --rivals gemm
      how far bf16 is from its bound, on a machine that is not idle
  python scripts/bench/layer.py --growth --pairs 3
      time with T, E and H, one at a time, with fitted exponents (some minutes)
  python scripts/bench/layer.py --sweep
      T=512..8192 with E=8/32/128 in every number format (hours)
  python scripts/bench/layer.py --sweep --tokens 512 --experts 8 --dtypes bf16 --rivals gemm loop
      a part of it

Number formats: fp32; bf16, a layer that was converted; autocast, a layer with
float32 weights under bf16 autocast, which is what --mhmoe-precision bf16 trains.
In the report "ours / rival" below 1 means that ours is faster; a wide range behind
it means that the machine was busy. docs/benchmarks/README.md says more.
"""
RIVALS = ("gemm", "loop", "torchscale", "mixtral-grouped", "mixtral-eager")
TORCHSCALE_MAX_TOKENS = 4096  # its dispatch tensors grow with T squared: 8 GB there
# Sizes of --sweep and --growth where none are given. Growth starts from the values nearest to START.
LISTS = {
    "tokens": ([512, 1024, 2048, 4096, 8192], [512, 1024, 2048, 4096, 8192, 16384], "num tokens T of a step"),
    "experts": ([8, 32, 128], [8, 16, 32, 64, 128, 256, 512], "experts E"),
    "heads": ([4], [1, 2, 3, 4, 6, 8, 12], "MH-MoE heads H"),
}
SIZES = {"embed-dim": (768, 384, "model dimension D"), "ffn-dim": (3072, 1536, "inner width F of an expert")}
START = Setting(2048, 8, num_heads=4)
FIELDS = {"tokens": "tokens", "experts": "num_experts", "heads": "num_heads"}


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(DESCRIPTION, EPILOG)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--sweep", action="store_true", help="every combination of the sizes below")
    modes.add_argument("--growth", action="store_true", help="tokens, experts, heads, one at a time, and the bound")
    for name, (sweep, growth, what) in LISTS.items():
        shown = f"{what} (--sweep: {' '.join(map(str, sweep))}; --growth: {' '.join(map(str, growth))})"
        parser.add_argument(f"--{name}", type=positive, nargs="+", metavar="N", help=shown)
    for name, (sweep, growth, what) in SIZES.items():
        parser.add_argument(f"--{name}", type=positive, metavar="N", help=f"{what} ({sweep}; --growth: {growth})")
    add_numbers(parser, {"top-k": (2, "experts per sub-token K")})
    for name, known in (("dtypes", list(DTYPES)), ("rivals", list(RIVALS))):
        parser.add_argument(f"--{name}", nargs="+", choices=known, default=known, help="default: all")
    parser.add_argument("--no-memory", action="store_true", help="measure time only")
    return parser


def chosen_settings(args: argparse.Namespace) -> dict[str, list[Setting]]:
    """Returns what to measure, by axis of growth; all under one name without ``--growth``.

    Raises:
        ValueError: a size that the layer refuses, or one that the targets' settings do not leave open.
    """
    given = {name: getattr(args, name.replace("-", "_")) for name in (*LISTS, *SIZES)}
    if not (args.sweep or args.growth):
        for name, value in {**given, "top-k": None if args.top_k == 2 else args.top_k}.items():
            if value is not None:
                raise ValueError(f"--{name} needs --sweep or --growth: the targets' settings have their own sizes")
    column = int(args.growth)
    values = {name: given[name] or (LISTS | SIZES)[name][column] for name in given}
    sizes = {"embed_dim": values["embed-dim"], "ffn_dim": values["ffn-dim"], "top_k": args.top_k}
    found: dict[str, list[Setting]] = {}
    for threads in args.threads:
        for dtype in args.dtypes:
            like = {"dtype": dtype, "threads": threads}
            if args.sweep:
                found.setdefault("", []).extend(
                    Setting(tokens, experts, num_heads=heads, **sizes, **like)
                    for experts in values["experts"] for heads in values["heads"] for tokens in values["tokens"]
                )  # fmt: skip
            elif args.growth:
                start = {}
                for name, field in FIELDS.items():
                    start[field] = min(values[name], key=lambda value, f=field: abs(value - getattr(START, f)))
                for name, field in FIELDS.items():
                    points = [Setting(**{**start, field: value}, **sizes, **like) for value in values[name]]
                    found.setdefault(field, []).extend(points)
            else:
                found.setdefault("", []).extend(dataclasses.replace(point, **like) for point in POINTS)
    return found


class Run:
    """Which measurements are made, and making them.

    Args:
        settings: what to measure, as ``chosen_settings`` returns it.
        rivals: contenders that can run here.
    """

    def __init__(self, args: argparse.Namespace, settings: dict[str, list[Setting]], rivals: Sequence[str]) -> None:
        self.args = args
        self.results = Results(growth=settings if args.growth else {})
        self.path = report_path(args.output, "-growth" if args.growth else "-sweep" if args.sweep else "-layer")
        points = list(dict.fromkeys(setting for axis in settings.values() for setting in axis))
        if args.growth:
            rivals = [name for name in rivals if name == "gemm"]
        has_rivals = {dataclasses.replace(point, dtype="fp32", threads=2) for point in list(POINTS)[:2]}
        duels = [
            (setting, "mhmoe", name) for setting in points for name in rivals
            if args.sweep or name == "gemm" or (as_fp32(setting) in has_rivals and setting.dtype != "autocast")
        ]  # fmt: skip
        if not (args.sweep or args.growth) and "loop" in rivals and "fp32" in args.dtypes:
            duels += [(Setting(4096, 8, threads=threads), "mhmoe", "loop") for threads in args.threads]
        # Like for like: our layer as Mixtral's block computes.
        duels += [(setting, "mhmoe-swiglu", name) for setting, _, name in duels if name == "mixtral-grouped"]
        self.duels = [duel for duel in duels if runs_at(duel[2], duel[0])]
        # At the smallest number of experts, which hardly changes it.
        fewest = min(setting.num_experts for setting in points)
        measured = [setting for setting in points if args.sweep and setting.num_experts == fewest]
        if not args.sweep and not args.growth:
            sizes = (2048, 4096, 8192)
            measured = [Setting(t, 8, dtype, threads=max(args.threads)) for dtype in args.dtypes for t in sizes]
        names = () if args.no_memory else [name for name in ("mhmoe", *rivals) if name != "gemm"]
        self.memory = [(setting, name) for setting in measured for name in names if runs_at(name, setting)]
        self.verified = list(dict.fromkeys(map(as_fp32, points[:1] if args.growth else points)))
        middle = statistics.median_high({setting.tokens for setting in points})
        self.profiled = [] if args.growth else [setting for setting in points if setting.tokens == middle]

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
                torch.set_num_threads(setting.threads)
                part(setting, *names)
                if part != self.time:
                    self.progress.update()
                self.write(complete=False)
        if not write_plot(self.path.with_suffix(".png"), self.results):
            self.results.notes.append("No plot: matplotlib is not installed.")
        self.write(complete=True)
        return self.results

    def write(self, *, complete: bool) -> None:
        write_layer_report(self.path, self.results, self.args, complete=complete)

    def verify(self, setting: Setting) -> None:
        what = {"loop": f"our layer against the plain loop, {setting.label()}"}
        if any(rival.startswith("mixtral") for *_, rival in self.duels):
            what["mixtral-eager"] = f"our SwiGLU layer against Mixtral's block, {setting.label()}"
        for rival, label in what.items():
            self.results.errors[label] = contenders.check(contenders.errors_against(rival, setting), label)

    def measure(self, setting: Setting, name: str) -> None:
        try:
            self.results.memory[setting, name] = in_fresh_process(measure_memory, name, setting)
        except RuntimeError as error:  # as when a rival needs more memory than the machine has
            if name.startswith("mhmoe"):
                raise
            self.results.notes.append(f"Memory of {NAMES[name]} at {setting.label()}: {error}")

    def time(self, setting: Setting, first: str, second: str) -> None:
        gc.collect()
        steps = build(first, setting), build(second, setting)
        pairs = time_pairs(*steps, pairs=self.args.pairs, clock=self.args.clock, after_pair=self.progress.update)
        self.results.times[setting, first, second] = pairs

    def take_apart(self, setting: Setting) -> None:
        self.results.breakdowns[setting.label()] = operator_times(build("mhmoe", setting))


def as_fp32(setting: Setting) -> Setting:
    """Returns the setting of the same sizes that values are compared in."""
    return dataclasses.replace(setting, dtype="fp32", threads=2)


def runs_at(name: str, setting: Setting) -> bool:
    return name != "torchscale" or setting.tokens <= TORCHSCALE_MAX_TOKENS


def in_fresh_process(call: Callable[..., Peak], *arguments: object) -> Peak:
    """Returns what ``call`` returns in a process that does nothing else; RuntimeError for whatever ends it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(call, *arguments).result()
        except Exception as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error


def measure_memory(name: str, setting: Setting) -> Peak:
    """Warms up on few tokens, then measures one full step."""
    torch.set_num_threads(setting.threads)
    build(name, dataclasses.replace(setting, tokens=min(64, setting.tokens)))()
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
