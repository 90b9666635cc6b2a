"""Time and peak memory of the MH-MoE layer against its bound and its rivals, and how its time grows."""

import argparse
import gc
import importlib.util
import itertools
import logging
import multiprocessing
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy
import torch
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import console
from bench.contenders import CONTENDERS, DTYPES, RIVALS, SIZES, Setting, build
from bench.memory import Peak, measure, ratios_text
from bench.timing import Operator, Pairs, operator_times, seconds, take_turns
from mhmoe_fairseq.common.arguments import whole
from mhmoe_fairseq.common.files import atomic_path
from mhmoe_fairseq.common.tables import markdown_table

DESCRIPTION = """\
Measure the MH-MoE layer (forward and backward) against the time of its matrix products in
the same number format (gemm: the bound), the plain autograd loop over experts, TorchScale's
static X-MoE, and Hugging Face's Mixtral block at equal FLOPs (grouped_mm, or its own loop).
Without sizes the settings are those of the project's targets: the bound at all of them,
the others at the first two. With sizes every combination of them is measured. autocast is
float32 weights under bf16 autocast, as --mhmoe-precision bf16 trains, bf16 a converted layer.
"""
EPILOG = """\
examples (docs/benchmarks/README.md says more):
  python scripts/bench/layer.py                          the targets, and memory: ten minutes
  python scripts/bench/layer.py --threads 1 --cpu-time   on a machine that is not idle
  python scripts/bench/layer.py --growth --pairs 3       time with T, E and H, with exponents
  python scripts/bench/layer.py --tokens 512 1024 2048 4096 8192 --experts 8 32 128
"""
# The settings that the targets speak of, and the limit of each number format: times the bound's time.
POINTS = {
    Setting(2048, 8): {"fp32": 1.20, "bf16": 1.7},
    Setting(2048, 32): {"fp32": 1.25, "bf16": 1.8},
    Setting(2048, 35, ffn_dim=2688): {"bf16": 1.8},
    Setting(2048, 8, num_heads=1): {"bf16": 1.6},
    Setting(2048, 35, embed_dim=256, ffn_dim=896): {"bf16": 2.1},
    Setting(2048, 35, embed_dim=128, ffn_dim=448): {"bf16": 2.6},
}
# Times a rival's time; and at E=8, T, the rival and its T: times its peak memory.
LIMITS = {
    **{(replace(at, dtype=dtype), "gemm"): limit for at, of in POINTS.items() for dtype, limit in of.items()},
    **{(Setting(tokens, 8), "loop"): 1.0 for tokens in (2048, 4096)},
    **{(Setting(2048, experts), "mixtral-grouped"): 1 / 1.8 for experts in (8, 32)},
}
MEMORY_LIMITS = {(2048, "loop", 2048): 0.8, (4096, "loop", 4096): 0.8, (8192, "mhmoe", 2048): 4.2}
TORCHSCALE_MAX_TOKENS = 4096  # its dispatch tensors grow with T squared: 8 GB there
START = Setting(2048, 8, embed_dim=384, ffn_dim=1536)  # of growth; every H below divides its D
GROWTH = {
    "tokens": (512, 1024, 2048, 4096, 8192, 16384),
    "num_experts": (8, 16, 32, 64, 128, 256, 512),
    "num_heads": (1, 2, 3, 4, 6, 8, 12),
}
METHOD = """\
Forward and backward of one layer, gradients starting from None, no optimiser; {pairs} pairs a duel after one warm-up. A
ratio is the median over the pairs of (ours / rival); the milliseconds are medians. What the contenders compute, and how
memory is measured: docs/benchmarks/README.md. The rows "SwiGLU" give our layer the function of Hugging Face's block."""


def build_parser() -> argparse.ArgumentParser:
    parser = console.make_parser(DESCRIPTION, EPILOG)
    parser.add_argument("--growth", action="store_true", help="how time grows with T, E and H, ours and the bound's")
    for size, (letter, what) in SIZES.items():
        shown = f"{what}, {letter} ({getattr(Setting(2048, 8), size)})"
        parser.add_argument(flag(size), dest=size, type=whole(), nargs="+", metavar="N", help=shown)
    for name, known in (("dtypes", list(DTYPES)), ("rivals", RIVALS)):
        parser.add_argument(f"--{name}", nargs="+", choices=known, default=known, help="default: all")
    parser.add_argument("--no-memory", action="store_true", help="measure time only")
    return parser


def flag(size: str) -> str:
    """Returns the flag of a setting's size."""
    return "--" + size.removeprefix("num_").replace("_", "-")


def chosen_settings(args: argparse.Namespace) -> tuple[list[Setting], list[Setting], list[Setting]]:
    """Returns the settings to time, those of them with rivals, and those whose memory is measured.

    Raises:
        ValueError: a size is refused, or contradicts ``--growth``.
    """
    given = {size: getattr(args, size) for size in SIZES if getattr(args, size)}
    kinds = [{"threads": threads, "dtype": dtype} for threads in args.threads for dtype in args.dtypes]
    if args.growth:
        if given:
            raise ValueError(f"{flag(next(iter(given)))} contradicts --growth, which has its own sizes")
        sizes = [(axis, value) for axis, values in GROWTH.items() for value in values]
        return list(dict.fromkeys(replace(START, **kind, **{axis: at}) for kind in kinds for axis, at in sizes)), [], []
    if given:
        combined = {"tokens": [2048], "num_experts": [8], **given}
        sizes = [dict(zip(combined, values)) for values in itertools.product(*combined.values())]
        return (points := [Setting(**size, **kind) for kind in kinds for size in sizes]), points, points
    points = [replace(point, **kind) for kind in kinds for point in POINTS]
    beside = [each for each in points if each.dtype != "autocast" and plain(each) in list(POINTS)[:2]]
    base = [each for each in beside if each.num_experts == 8 and each.threads == max(args.threads)]
    return points, beside, [replace(each, tokens=tokens) for each in base for tokens in (2048, 4096, 8192)]


def plan(args: argparse.Namespace, rivals: Sequence[str]) -> list[tuple[str, Setting, str, str]]:
    """Returns what ``Run`` is to do: a method's name, and the setting, contender and rival that it is given."""
    points, beside, measured = chosen_settings(args)
    names, bound = [name for name in rivals if name != "gemm"], ["gemm"] if "gemm" in rivals or args.growth else []
    jobs = [("memory", each, name, "") for each in measured for name in ("mhmoe", *names) if not args.no_memory]
    for setting in points:
        for rival in [*bound, *(names if setting in beside else [])]:
            jobs.append(("time", setting, "mhmoe", rival))
            if rival == "mixtral-grouped":
                jobs.append(("time", setting, "mhmoe-swiglu", rival))
    longer = [each for each in measured if each not in points and each.tokens == 4096 and "loop" in names]
    jobs += [("time", each, "mhmoe", "loop") for each in longer]
    middle = statistics.median_high(each.tokens for each in points)
    jobs += [("profile", each, "mhmoe", "") for each in beside if each.tokens == middle]
    return [job for job in jobs if "torchscale" not in job or job[1].tokens <= TORCHSCALE_MAX_TOKENS]


def plain(setting: Setting) -> Setting:
    """Returns the setting of the same sizes in float32 and with the default threads."""
    return replace(setting, dtype="fp32", threads=Setting.threads)


@dataclass
class Results:
    """Everything that one run found out."""

    times: dict[tuple[Setting, str, str], Pairs] = field(default_factory=dict)
    memory: dict[tuple[Setting, str], Peak] = field(default_factory=dict)
    profiles: dict[str, list[Operator]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def growth(self) -> Iterator[tuple[str, str, dict[int, tuple[float, float]]]]:
        """Yields sizes of which three or more were timed: the size, the other sizes, ours and the bound's medians."""
        for axis in SIZES:
            alike: dict[str, dict[int, tuple[float, float]]] = defaultdict(dict)
            for (setting, first, rival), pairs in self.times.items():
                if (first, rival) == ("mhmoe", "gemm"):
                    alike[setting.label(but=axis)][getattr(setting, axis)] = pairs.medians
            yield from ((axis, label, dict(sorted(of.items()))) for label, of in alike.items() if len(of) > 2)


def targets(results: Results) -> Iterator[console.Target]:
    """Yields the promises that the measured settings can decide, on any number of threads."""
    for (setting, first, rival), pairs in results.times.items():
        limit = LIMITS.get((replace(setting, threads=Setting.threads), rival))
        if first == "mhmoe" and limit:
            promise = f"forward + backward in at most {limit:.2f}x the time of {CONTENDERS[rival].label}"
            yield f"{promise} ({setting.label()}): {pairs.ratio:.2f}x {pairs.range_text()}", pairs.ratio <= limit
    for (setting, name), ours in results.memory.items():
        for (tokens, rival, other), limit in MEMORY_LIMITS.items():
            theirs = results.memory.get((replace(setting, tokens=other), rival))
            is_spoken_of = plain(setting) == Setting(tokens, 8) and setting.dtype != "autocast"
            if theirs and name == "mhmoe" and is_spoken_of:
                text, worst = ratios_text(ours, theirs)
                promise = f"peak memory at most {limit:.1f}x that of {CONTENDERS[rival].label}, T={other}"
                yield f"{promise} ({setting.label()}): {text}", worst <= limit


def times_table(results: Results) -> str:
    """Returns a row for each duel."""
    rows = []
    for (setting, *names), pairs in results.times.items():
        rows.append((
            setting.label(), *(CONTENDERS[name].label for name in names),
            *(f"{median * 1e3:.1f}" for median in pairs.medians), f"**{pairs.ratio:.2f}** {pairs.range_text()}",
            f"{1 / pairs.ratio:.2f}x", f"{setting.flops() / pairs.medians[0] / 1e9:.0f}",
        ))  # fmt: skip
    head = ("setting", "ours", "rival", "ours ms", "rival ms", "ours / rival", "speed-up", "ours GFLOP/s")
    return markdown_table(head, rows) if rows else "Nothing was timed."


def growth_table(results: Results) -> str:
    """Returns the laws that fit best how our time and the bound's grow; nothing where no size took three values."""
    rows = []
    for axis, label, medians in results.growth():
        letter = SIZES[axis][0]
        exponents, _ = numpy.polyfit(numpy.log(list(medians)), numpy.log(list(medians.values())), 1)
        laws = (f"{letter}^{exponent:.2f}" for exponent in exponents)
        rows.append((label, f"{letter} = {', '.join(map(str, medians))}", *laws))
    return markdown_table(("setting", "size", "ours grows as", "the bound as"), rows) if rows else ""


def memory_table(results: Results) -> str:
    """Returns a row for each contender and setting; nothing if memory was not measured."""
    rows = []
    for (setting, name), peak in results.memory.items():
        loop = results.memory.get((setting, "loop"))
        rows.append((
            setting.label(), CONTENDERS[name].label, f"{peak['tensors']:.1f}",
            "-" if peak["resident"] is None else f"{peak['resident']:.1f}",
            "-" if loop is None else f"{peak['tensors'] / loop['tensors']:.2f}",
            f"{peak['tensors'] * 1024 / setting.tokens:.0f}",
        ))  # fmt: skip
    head = ("setting", "contender", "tensors", "resident", "tensors / plain loop's", "KiB per token")
    return markdown_table(head, rows) if rows else ""


def write_plot(path: Path, results: Results) -> None:
    """Draws how time grows with each size that took three values or more."""
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # an import made the root logger tell everything
    found = list(results.growth())
    figure = Figure(figsize=(6, 4 * len(found)), layout="constrained")
    for panel, (axis, label, medians) in zip(figure.subplots(len(found), squeeze=False).flat, found):
        panel.loglog(list(medians), list(medians.values()), marker="o", label=("ours", "bound"))
        panel.set(title=label, xlabel=SIZES[axis][1], ylabel="seconds of a step")
        panel.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


class Run:
    """The measurements of one command, their results, and the report, which is written after each."""

    def __init__(self, args: argparse.Namespace, notes: Sequence[str] = ()) -> None:
        self.args, self.results = args, Results(notes=list(notes))
        self.path = console.report_path(args.output, "-growth" if args.growth else "-layer")

    def __call__(self, jobs: Sequence[tuple[str, Setting, str, str]]) -> None:
        total = sum(self.args.pairs if what == "time" else 1 for what, *_ in jobs)
        with tqdm(total=total, unit="step", dynamic_ncols=True, smoothing=0.1) as self.progress:
            for what, setting, name, rival in jobs:
                self.progress.set_description_str(f"{what} {name} {rival} {setting.label()}")
                torch.set_num_threads(setting.threads)
                getattr(self, what)(setting, name, rival)
                self.write_report(" (incomplete: the run is going on or was interrupted)")
        if any(self.results.growth()) and importlib.util.find_spec("matplotlib"):
            write_plot(self.path.with_suffix(".png"), self.results)
        self.write_report()

    def write_report(self, state: str = "") -> None:
        """Replaces the report by what is known."""
        plot = self.path.with_suffix(".png")
        sections = {
            "How it was measured": METHOD.format(pairs=self.args.pairs),
            "Time": times_table(self.results),
            "Growth (least squares of the logarithms)": growth_table(self.results),
            "Peak memory (MiB)": memory_table(self.results),
            **console.operator_sections(self.results.profiles),
            "Notes": "\n".join(f"- {note}" for note in self.results.notes),
            "Plot": f"![Time by size]({plot.name})" if plot.exists() and not state else "",
        }
        console.write_report(self.path, f"MH-MoE layer benchmark{state}", self.args, targets(self.results), sections)

    def memory(self, setting: Setting, name: str, _: str) -> None:
        """Measures a contender in a process that does nothing else."""
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                self.results.memory[setting, name] = pool.submit(measure_memory, name, setting).result()
            except Exception as error:  # as when it needs more memory than the machine has
                said = f"Memory of {CONTENDERS[name].label} at {setting.label()}: {type(error).__name__}: {error}"
                if name == "mhmoe":
                    raise RuntimeError(said) from error
                self.results.notes.append(said)
        self.progress.update()

    def time(self, setting: Setting, name: str, rival: str) -> None:
        gc.collect()
        steps = [partial(seconds, build(each, setting), self.args.clock) for each in (name, rival)]
        self.results.times[setting, name, rival] = take_turns(steps, self.args.pairs, self.progress.update)

    def profile(self, setting: Setting, name: str, _: str) -> None:
        self.results.profiles[setting.label()] = operator_times(build(name, setting))
        self.progress.update()


def measure_memory(name: str, setting: Setting) -> Peak:
    """Warms up on few tokens, then measures one full step."""
    torch.set_num_threads(setting.threads)
    build(name, replace(setting, tokens=min(64, setting.tokens)))()
    step = build(name, setting)
    return measure(step, step.clear, step.tensors)


def run(args: argparse.Namespace) -> tuple[Path, list[console.Target]]:
    """Returns where the report is, and the targets."""
    missing = [name for name in args.rivals if importlib.util.find_spec(CONTENDERS[name].package) is None]
    jobs = plan(args, [name for name in args.rivals if name not in missing])
    made = Run(args, [f"{label} was left out: pip install {of}" for label, *_, of in map(CONTENDERS.get, missing)])
    made(jobs)
    return made.path, list(targets(made.results))


if __name__ == "__main__":
    sys.exit(console.run_benchmark(run, build_parser()))
