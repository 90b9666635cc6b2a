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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import console, contenders
from bench.contenders import DTYPES, NAMES, Setting, build
from bench.memory import Peak, measure, ratios_text
from bench.timing import Operator, Pairs, growth_exponent, operator_times, time_pairs
from mhmoe_fairseq.common.arguments import whole
from mhmoe_fairseq.common.files import atomic_path
from mhmoe_fairseq.common.tables import markdown_table

DESCRIPTION = """\
Measure the MH-MoE layer (forward and backward) against the time of its matrix products in
the same number format (gemm: the bound), the plain autograd loop over experts, TorchScale's
static X-MoE, and Hugging Face's Mixtral block at equal FLOPs (grouped_mm, or its own loop).
Before timing, our layer is compared with the plain loop, values and all gradients.
Without sizes the settings are those of the project's targets: the bound at all of them,
the others at the first two. With sizes every combination of them is measured.
"""
EPILOG = """\
examples:
  python scripts/bench/layer.py                          the targets, and memory: ten minutes
  python scripts/bench/layer.py --threads 1 --cpu-time --dtypes bf16 --rivals gemm --no-memory
      how far bf16 is from its bound, on a machine that is not idle
  python scripts/bench/layer.py --growth --pairs 3       time with T, E and H, with exponents
  python scripts/bench/layer.py --tokens 512 1024 2048 4096 8192 --experts 8 32 128
Number formats: fp32; bf16, a layer that was converted; autocast, float32 weights under bf16
autocast, which is what --mhmoe-precision bf16 trains. docs/benchmarks/README.md says more.
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
MEMORY_LIMIT, MIXTRAL_SPEEDUP, LINEARITY = 0.8, 1.8, 1.05
AXES = {"tokens": "T", "num_experts": "E", "num_heads": "H"}
RIVALS = ("gemm", "loop", "torchscale", "mixtral-grouped", "mixtral-eager")
TORCHSCALE_MAX_TOKENS = 4096  # its dispatch tensors grow with T squared: 8 GB there
SIZES = {
    "tokens": "tokens T of a step", "num_experts": "experts E", "num_heads": "MH-MoE heads H",
    "embed_dim": "model dimension D", "ffn_dim": "inner width F of an expert", "top_k": "experts per sub-token K",
}  # fmt: skip
START = Setting(2048, 8, embed_dim=384, ffn_dim=1536)  # of growth; every H below divides its D
GROWTH = {
    "tokens": (512, 1024, 2048, 4096, 8192, 16384),
    "num_experts": (8, 16, 32, 64, 128, 256, 512),
    "num_heads": (1, 2, 3, 4, 6, 8, 12),
}
METHOD = """\
Forward and backward of one layer, gradients starting from None, no optimiser; {pairs} pairs a duel after one warm-up. A
ratio is the median over the pairs of (ours / rival); the milliseconds are medians. What the contenders compute, and how
memory is measured: docs/benchmarks/README.md. The rows "SwiGLU" give our layer the function of Hugging Face's block.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = console.make_parser(DESCRIPTION, EPILOG)
    parser.add_argument("--growth", action="store_true", help="how time grows with T, E and H, ours and the bound's")
    for size, what in SIZES.items():
        shown = f"{what} ({getattr(Setting(2048, 8), size)})"
        parser.add_argument(flag(size), dest=size, type=whole(), nargs="+", metavar="N", help=shown)
    for name, known in (("dtypes", list(DTYPES)), ("rivals", list(RIVALS))):
        parser.add_argument(f"--{name}", nargs="+", choices=known, default=known, help="default: all")
    parser.add_argument("--no-memory", action="store_true", help="measure time only")
    return parser


def flag(size: str) -> str:
    """Returns the flag of a setting's size."""
    return "--" + size.removeprefix("num_").replace("_", "-")


def chosen_settings(args: argparse.Namespace) -> dict[str, list[Setting]]:
    """Returns what to measure by the size that grows, or under one name; ``ValueError`` for a size that is refused."""
    given = {size: getattr(args, size) for size in SIZES if getattr(args, size)}
    if given and args.growth:
        raise ValueError(f"{flag(next(iter(given)))} contradicts --growth, which has its own sizes")
    if args.growth:
        start = asdict(START)
        found = {axis: [{**start, axis: value} for value in values] for axis, values in GROWTH.items()}
    elif given:
        combined = {"tokens": [2048], "num_experts": [8], **given}
        found = {"": [dict(zip(combined, values)) for values in itertools.product(*combined.values())]}
    else:
        found = {"": list(map(asdict, POINTS))}
    kinds = list(itertools.product(args.threads, args.dtypes))
    return {
        axis: [Setting(**{**point, "dtype": dtype, "threads": threads}) for threads, dtype in kinds for point in points]
        for axis, points in found.items()
    }


@dataclass
class Results:
    """Everything that one run found out.

    Attributes:
        growth: settings by the field that differs among them.
        errors: what was verified, with the largest relative error.
    """

    times: dict[tuple[Setting, str, str], Pairs] = field(default_factory=dict)
    growth: dict[str, list[Setting]] = field(default_factory=dict)
    memory: dict[tuple[Setting, str], Peak] = field(default_factory=dict)
    breakdowns: dict[str, list[Operator]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def targets(results: Results) -> Iterator[console.Target]:
    """Yields the promises that the measured settings can decide, on any number of threads."""
    faster = f"at least {MIXTRAL_SPEEDUP}x as fast as {NAMES['mixtral-grouped']}"
    bound = "forward + backward at most {:.2f}x the GEMM bound".format
    promises = {
        (replace(point, dtype=dtype), "gemm"): (limit, bound(limit))
        for point, limits in POINTS.items() for dtype, limit in limits.items()
    }  # fmt: skip
    promises |= {(Setting(tokens, 8), "loop"): (1.0, "no slower than the plain loop") for tokens in (2048, 4096)}
    promises |= {(Setting(2048, experts), "mixtral-grouped"): (1 / MIXTRAL_SPEEDUP, faster) for experts in (8, 32)}
    for (setting, first, rival), pairs in results.times.items():
        limit, promise = promises.get((replace(setting, threads=Setting.threads), rival), (None, ""))
        if first == "mhmoe" and limit is not None:
            measured = f"{pairs.ratio:.2f}x its time {pairs.range_text()}, {1 / pairs.ratio:.2f}x its speed"
            yield f"{promise} ({setting.label()}): {measured}", pairs.ratio <= limit
    loop, linear = f"peak memory at most {MEMORY_LIMIT}x the plain loop's", "peak memory linear in T"
    for (setting, name), ours in results.memory.items():
        for tokens, rival, other, limit, promise in [
            *((tokens, "loop", tokens, MEMORY_LIMIT, loop) for tokens in (2048, 4096)),
            (8192, "mhmoe", 2048, 4 * LINEARITY, f"{linear}: at most {4 * LINEARITY:.1f}x of T=2048"),
        ]:
            theirs = results.memory.get((replace(setting, tokens=other), rival))
            is_spoken_of = replace(setting, threads=Setting.threads, dtype="fp32") == Setting(tokens, 8)
            if theirs and name == "mhmoe" and is_spoken_of and setting.dtype != "autocast":
                text, worst = ratios_text(ours, theirs)
                yield f"{promise} ({setting.label()}): {text}", worst <= limit


def write_layer_report(path: Path, results: Results, args: argparse.Namespace, *, complete: bool) -> None:
    """Replaces the report at ``path`` by what is known, ``complete`` or not yet."""
    title = "MH-MoE layer benchmark" + ("" if complete else " (incomplete: the run is going on or was interrupted)")
    errors = "\n".join(f"- {what}: {error:.1e}" for what, error in results.errors.items())
    verified = f"Checked before timing, largest relative error over output and gradients (limit 1e-5):\n\n{errors}"
    parts = ["## How it was measured", METHOD.format(pairs=args.pairs), verified if errors else "", "## Time"]
    parts += (_growth(results) if results.growth else [_times(results)]) if results.times else ["Nothing was timed."]
    if results.memory:
        parts += ["## Peak memory (MiB)", _memory(results)]
    for label, operators in results.breakdowns.items():
        parts += [f"## Where our time goes: {label}", console.operators_table(operators)]
    if results.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in results.notes)]
    if complete and path.with_suffix(".png").exists():
        parts.append(f"![Time and memory]({path.with_suffix('.png').name})")
    console.write_report(path, title, args.threads, list(targets(results)), parts, args.clock)


def _times(results: Results) -> str:
    rows = []
    for (setting, first, second), pairs in results.times.items():
        rows.append((
            setting.label(), NAMES[first], NAMES[second], *(f"{median * 1e3:.1f}" for median in pairs.medians),
            f"**{pairs.ratio:.2f}** {pairs.range_text()}", f"{1 / pairs.ratio:.2f}x",
            f"{setting.flops() / pairs.medians[0] / 1e9:.0f}",
        ))  # fmt: skip
    head = ("setting", "ours", "rival", "ours ms", "rival ms", "ours / rival", "speed-up", "ours GFLOP/s")
    return markdown_table(head, rows)


def _growth(results: Results) -> list[str]:
    """Returns a table for each axis, number format and number of threads, and the laws that fit it best."""
    parts = []
    for axis, settings in results.growth.items():
        by_kind: dict[str, dict[int, Pairs]] = defaultdict(dict)
        for setting in settings:
            if pairs := results.times.get((setting, "mhmoe", "gemm")):
                kind = setting.label().replace(f"{AXES[axis]}={getattr(setting, axis)} ", "")
                by_kind[kind][getattr(setting, axis)] = pairs
        for kind, points in by_kind.items():
            medians = [pairs.medians for pairs in points.values()]
            laws = [f"{AXES[axis]}^{growth_exponent(list(points), times):.2f}" for times in zip(*medians)]
            rows = [
                (f"{size}", *(f"{median * 1e3:.1f}" for median in pairs.medians), f"{pairs.ratio:.2f}")
                for size, pairs in points.items()
            ]
            parts += [
                f"### By {AXES[axis]}: {kind}",
                "Our time grows as {}, the bound's as {} (least squares of the logarithms).".format(*laws),
                markdown_table((AXES[axis], "ours ms", "bound ms", "ours / bound"), rows),
            ]
    return parts


def _memory(results: Results) -> str:
    rows = []
    for (setting, name), peak in results.memory.items():
        loop = results.memory.get((setting, "loop"))
        rows.append((
            setting.label(), NAMES[name], f"{peak['tensors']:.1f}",
            "-" if peak["resident"] is None else f"{peak['resident']:.1f}",
            "-" if loop is None else f"{peak['tensors'] / loop['tensors']:.2f}",
            f"{peak['tensors'] * 1024 / setting.tokens:.0f}",
        ))  # fmt: skip
    head = ("setting", "contender", "tensors", "resident", "tensors / plain loop's", "KiB per token")
    return markdown_table(head, rows)


def write_plot(path: Path, results: Results) -> bool:
    """Draws how time grows, or every ratio of times as a bar; returns False without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # an import made the root logger tell everything
    figure = Figure(figsize=(15, 4.5 if results.growth else 1 + 0.2 * len(results.times)), layout="constrained")
    for axes, (axis, settings) in zip(figure.subplots(1, 3) if results.growth else (), results.growth.items()):
        lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for setting in settings:
            for name, seconds in zip(("ours", "bound"), results.times[setting, "mhmoe", "gemm"].medians):
                lines[f"{name}, {setting.dtype}, {setting.threads} threads"].append((getattr(setting, axis), seconds))
        for label, points in lines.items():
            axes.loglog(*zip(*points), marker="o", label=label)
        axes.set(xlabel=AXES[axis], ylabel="seconds of a step")
        axes.legend(fontsize=8)
    if not results.growth:
        axes = figure.subplots()
        labels = [f"{NAMES[first]} / {NAMES[second]}, {each.label()}" for each, first, second in results.times]
        axes.barh(labels, [pairs.ratio for pairs in results.times.values()])
        axes.axvline(1.0, color="grey", linewidth=1)
        axes.set(xlabel="time, ours / rival's (below 1 = ours faster)")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return True


class Run:
    """Which measurements are made of ``settings`` and by which of the contenders that can run here, and making them."""

    def __init__(self, args: argparse.Namespace, settings: dict[str, list[Setting]], rivals: Sequence[str]) -> None:
        self.args, self.results = args, Results(growth=settings if args.growth else {})
        self.path = console.report_path(args.output, "-growth" if args.growth else "-layer")
        points = measured = list(dict.fromkeys(setting for axis in settings.values() for setting in axis))
        rivals = ["gemm"] if args.growth else rivals
        has_rivals = lambda setting: True  # noqa: E731
        if not args.growth and not any(getattr(args, size) for size in SIZES):
            kinds = [{"dtype": dtype, "threads": max(args.threads)} for dtype in args.dtypes if dtype != "autocast"]
            measured = [Setting(tokens, 8, **kind) for kind in kinds for tokens in (2048, 4096, 8192)]
            has_rivals = lambda setting: setting.dtype != "autocast" and as_fp32(setting) in list(POINTS)[:2]  # noqa: E731
        duels = [(each, "mhmoe", name) for each in points for name in rivals if name == "gemm" or has_rivals(each)]
        if measured is not points and "loop" in rivals:  # at twice the tokens, too
            duels += [(each, "mhmoe", "loop") for each in measured if (each.tokens, each.dtype) == (4096, "fp32")]
        duels += [(each, "mhmoe-swiglu", name) for each, _, name in duels if name == "mixtral-grouped"]
        self.duels = [duel for duel in duels if runs_at(duel[2], duel[0])]
        names = [] if args.no_memory or args.growth else [name for name in ("mhmoe", *rivals) if name != "gemm"]
        self.memory = [(each, name) for each in measured for name in names if runs_at(name, each)]
        self.verified = list(dict.fromkeys(map(as_fp32, points[:1] if args.growth else points)))
        middle = statistics.median_high({each.tokens for each in points})
        self.profiled = [each for each in points if each.tokens == middle and has_rivals(each) and not args.growth]

    def __call__(self) -> Results:
        """Verifies, measures, times, takes apart; the report is written after every part."""
        parts = [
            *((self.verify, (setting,)) for setting in self.verified), *((self.measure, job) for job in self.memory),
            *((self.time, duel) for duel in self.duels), *((self.take_apart, (setting,)) for setting in self.profiled),
        ]  # fmt: skip
        total = len(parts) + len(self.duels) * (self.args.pairs - 1)
        with tqdm(total=total, unit="step", dynamic_ncols=True, smoothing=0.1) as self.progress:
            for part, (setting, *names) in parts:
                self.progress.set_description_str(f"{part.__name__} {' / '.join(names)} {setting.label()}")
                torch.set_num_threads(setting.threads)
                part(setting, *names)
                self.progress.update(part != self.time)
                write_layer_report(self.path, self.results, self.args, complete=False)
        if not write_plot(self.path.with_suffix(".png"), self.results):
            self.results.notes.append("No plot: matplotlib is not installed.")
        write_layer_report(self.path, self.results, self.args, complete=True)
        return self.results

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
        pairs = time_pairs(*steps, self.args.pairs, self.args.clock, self.progress.update)
        self.results.times[setting, first, second] = pairs

    def take_apart(self, setting: Setting) -> None:
        self.results.breakdowns[setting.label()] = operator_times(build("mhmoe", setting))


def as_fp32(setting: Setting) -> Setting:
    """Returns the setting of the same sizes that values are compared in."""
    return replace(setting, dtype="fp32", threads=Setting.threads)


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
    build(name, replace(setting, tokens=min(64, setting.tokens)))()
    step = build(name, setting)
    return measure(step, step.clear, step.tensors)


def run(args: argparse.Namespace) -> int:
    settings = chosen_settings(args)  # first: bad sizes end the run before anything is said
    reasons = {name: contenders.unavailable(name) for name in args.rivals}
    planned = Run(args, settings, [name for name, reason in reasons.items() if reason is None])
    planned.results.notes += [f"{NAMES[name]} was left out: {reason}." for name, reason in reasons.items() if reason]
    for note in planned.results.notes:
        tqdm.write(note)
    return console.conclude(planned.path, list(targets(planned())), args.check)


if __name__ == "__main__":
    sys.exit(console.run_benchmark(run, build_parser()))
