"""What a benchmark of the layer found out, the targets that it decides, its report and plot."""

import argparse
import dataclasses
import importlib.util
import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mhmoe_fairseq.common.files import atomic_path
from mhmoe_fairseq.common.tables import markdown_table

from .console import Target, operators_table, write_report
from .contenders import NAMES, Setting
from .timing import Pairs, growth_exponent

# The settings that the targets speak of, and the limit of each number format: times the bound's time.
POINTS = {
    Setting(2048, 8): {"fp32": 1.20, "bf16": 1.7},
    Setting(2048, 32): {"fp32": 1.25, "bf16": 1.8},
    Setting(2048, 35, ffn_dim=2688): {"bf16": 1.8},
    Setting(2048, 8, num_heads=1): {"bf16": 1.6},
    Setting(2048, 35, embed_dim=256, ffn_dim=896): {"bf16": 2.1},
    Setting(2048, 35, embed_dim=128, ffn_dim=448): {"bf16": 2.6},
}
MEMORY_LIMIT = 0.8
MIXTRAL_SPEEDUP = 1.8
LINEARITY = 1.05
AXES = {"tokens": "T", "num_experts": "E", "num_heads": "H"}
METHOD = """\
Forward and backward of one layer, gradients starting from None, no optimiser; {pairs} pairs a duel after one warm-up. A
ratio is the median over the pairs of (ours / rival); the milliseconds are medians. What the contenders compute, and how
memory is measured: docs/benchmarks/README.md. The rows "SwiGLU" give our layer the function of Hugging Face's block.
"""


@dataclass
class Results:
    """Everything that one run found out.

    Attributes:
        times: seconds in pairs, by setting and the two contenders.
        growth: settings by the field that differs among them.
        memory: peak MiB by setting and contender: ``tensors``, and ``resident`` where the system tells it.
        breakdowns: by setting, operators with milliseconds per step and share.
        errors: what was verified, with the largest relative error.
    """

    times: dict[tuple[Setting, str, str], Pairs] = field(default_factory=dict)
    growth: dict[str, list[Setting]] = field(default_factory=dict)
    memory: dict[tuple[Setting, str], dict[str, float | None]] = field(default_factory=dict)
    breakdowns: dict[str, list[tuple[str, float, float]]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def targets(results: Results) -> Iterator[Target]:
    """Yields the promises that the measured settings can decide, on any number of threads."""
    faster = f"at least {MIXTRAL_SPEEDUP}x as fast as {NAMES['mixtral-grouped']}"
    bound = "forward + backward at most {:.2f}x the GEMM bound".format
    promises = {
        (dataclasses.replace(point, dtype=dtype), "gemm"): (limit, bound(limit))
        for point, limits in POINTS.items()
        for dtype, limit in limits.items()
    }
    promises |= {(Setting(tokens, 8), "loop"): (1.0, "no slower than the plain loop") for tokens in (2048, 4096)}
    promises |= {(Setting(2048, experts), "mixtral-grouped"): (1 / MIXTRAL_SPEEDUP, faster) for experts in (8, 32)}
    for (setting, first, rival), pairs in results.times.items():
        key = dataclasses.replace(setting, threads=Setting.threads), rival
        if first == "mhmoe" and key in promises:
            limit, promise = promises[key]
            measured = f"{pairs.ratio:.2f}x its time {pairs.range_text()}, {1 / pairs.ratio:.2f}x its speed"
            yield f"{promise} ({setting.label()}): {measured}", pairs.ratio <= limit
    linear = f"peak memory linear in T (T=8192 needs at most {4 * LINEARITY:.1f}x of T=2048)"
    less = f"peak memory at most {MEMORY_LIMIT}x the plain loop's"
    for (setting, name), ours in results.memory.items():
        if name != "mhmoe" or setting.dtype == "autocast":
            continue
        like = {2048: ("loop", 2048), 4096: ("loop", 4096), 8192: ("mhmoe", 2048)}.get(setting.tokens)
        other = like and dataclasses.replace(setting, tokens=like[1])
        theirs = results.memory.get((other, like[0])) if like else None
        if theirs and dataclasses.replace(other, dtype="fp32", threads=Setting.threads) in POINTS:
            limit, promise = (MEMORY_LIMIT, less) if like[0] == "loop" else (4 * LINEARITY, linear)
            both = [what for what in ("tensors", "resident") if ours[what] and theirs[what]]
            ratios = {what: ours[what] / theirs[what] for what in both}
            texts = [f"{what} {ours[what]:.0f} / {theirs[what]:.0f} MiB = {of:.2f}x" for what, of in ratios.items()]
            yield f"{promise} ({setting.label()}): {', '.join(texts)}", max(ratios.values()) <= limit


def write_layer_report(path: Path, results: Results, args: argparse.Namespace, *, complete: bool) -> None:
    """Replaces the report at ``path`` by what is known, ``complete`` or not yet."""
    title = "MH-MoE layer benchmark" + ("" if complete else " (incomplete: the run is going on or was interrupted)")
    errors = [f"- {what}: {error:.1e}" for what, error in results.errors.items()]
    parts = [
        "## How it was measured",
        METHOD.format(pairs=args.pairs),
        "Checked before timing, largest relative error over output and gradients (limit 1e-5):" if errors else "",
        "\n".join(errors) or "Nothing was verified in this run.",
        "## Time",
        *((_growth(results) if results.growth else _times(results)) or ["Nothing was timed."]),
        *(["## Peak memory (MiB)", _memory(results)] if results.memory else []),
        *(["## Where our time goes", *_breakdowns(results)] if results.breakdowns else []),
    ]
    if results.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in results.notes)]
    if complete and path.with_suffix(".png").exists():
        parts.append(f"![Time and memory]({path.with_suffix('.png').name})")
    write_report(path, title, args.threads, list(targets(results)), parts, args.clock)


def _order(setting: Setting) -> tuple[object, ...]:
    sizes = -setting.embed_dim, -setting.num_heads, setting.num_experts, -setting.ffn_dim, setting.tokens
    return setting.threads, setting.dtype != "fp32", setting.dtype, *sizes


def _times(results: Results) -> list[str]:
    rows: dict[Setting, list[tuple[str, ...]]] = defaultdict(list)
    for (setting, first, second), pairs in results.times.items():
        rows[setting].append((
            NAMES[first], NAMES[second], *_milliseconds(pairs),
            f"**{pairs.ratio:.2f}** {pairs.range_text()}", f"{1 / pairs.ratio:.2f}x",
            f"{setting.flops() / pairs.first_median / 1e9:.0f}",
        ))  # fmt: skip
    head = ("ours", "rival", "ours ms", "rival ms", "ours / rival (pairs)", "speed-up", "ours GFLOP/s")
    parts = []
    for setting in sorted(rows, key=_order):
        parts += [f"### {setting.label()} ({setting.flops() / 1e9:.0f} GFLOP)", markdown_table(head, rows[setting])]
    return parts


def _growth(results: Results) -> list[str]:
    """Returns a table for each axis, number format and number of threads, and the laws that fit it best."""
    parts = []
    for axis, settings in results.growth.items():
        by_kind: dict[tuple[int, str], dict[int, Pairs]] = defaultdict(dict)
        for setting in settings:
            if pairs := results.times.get((setting, "mhmoe", "gemm")):
                by_kind[setting.threads, setting.dtype][getattr(setting, axis)] = pairs
        for kind, points in by_kind.items():
            first = next(setting for setting in settings if (setting.threads, setting.dtype) == kind)
            letter, times = AXES[axis], list(points.values())
            ours, bound = (
                f"{letter}^{growth_exponent(list(points), seconds):.2f}"
                for seconds in ([each.first_median for each in times], [each.second_median for each in times])
            )
            rows = [(f"{n}", *_milliseconds(pairs), f"{pairs.ratio:.2f}") for n, pairs in points.items()]
            parts += [
                f"### By {letter}: {first.label().replace(f'{letter}={getattr(first, axis)} ', '')}",
                f"Our time grows as {ours}, the bound's as {bound} (least squares of the logarithms).",
                markdown_table((letter, "ours ms", "bound ms", "ours / bound"), rows),
            ]
    return parts


def _milliseconds(pairs: Pairs) -> tuple[str, str]:
    return f"{pairs.first_median * 1e3:.1f}", f"{pairs.second_median * 1e3:.1f}"


def _memory(results: Results) -> str:
    rows = []
    for (setting, name), peak in sorted(results.memory.items(), key=lambda item: _order(item[0][0])):
        loop = results.memory.get((setting, "loop"))
        rows.append((
            setting.label(), NAMES[name], f"{peak['tensors']:.1f}",
            "-" if peak["resident"] is None else f"{peak['resident']:.1f}",
            "-" if loop is None else f"{peak['tensors'] / loop['tensors']:.2f}",
            f"{peak['tensors'] * 1024 / setting.tokens:.0f}",
        ))  # fmt: skip
    head = ("setting", "contender", "tensors", "resident", "tensors / plain loop's", "KiB per token")
    return markdown_table(head, rows)


def _breakdowns(results: Results) -> list[str]:
    parts = []
    for label, operators in results.breakdowns.items():
        parts += [f"### {label}", operators_table(operators)]
    return parts


def write_plot(path: Path, results: Results) -> bool:
    """Time against the bound and the rivals, and peak memory; or how time grows. False without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # an import made the root logger tell everything

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    for axes, (lines, title, xlabel, ylabel) in zip(figure.subplots(1, 3), _panels(results)):
        for name, points in lines.items():
            axes.plot(*zip(*sorted(points)), marker="o", label=name)
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel, yscale="linear" if "ratio" in ylabel else "log")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        if "ratio" in ylabel:
            axes.axhline(1.0, color="grey", linewidth=1)
        if lines:
            axes.legend(fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return True


def _panels(results: Results) -> list[tuple[dict[str, list[tuple[int, float]]], str, str, str]]:
    """Returns three panels: lines, title and the axes' labels."""
    bound, rivals, memory = (defaultdict(list) for _ in range(3))
    panels = []
    for axis, settings in results.growth.items():
        lines = defaultdict(list)
        for setting in settings:
            if pairs := results.times.get((setting, "mhmoe", "gemm")):
                label = f"{setting.dtype}, {setting.threads} threads"
                lines[label].append((getattr(setting, axis), pairs.first_median * 1e3))
                lines[f"bound, {label}"].append((getattr(setting, axis), pairs.second_median * 1e3))
        panels.append((lines, f"Time of a step by {AXES[axis]}", AXES[axis], "ms"))
    for (setting, first, second), pairs in results.times.items():
        label = setting.label().replace(f" T={setting.tokens}", "")
        if (first, second) == ("mhmoe", "gemm"):
            bound[label].append((setting.tokens, pairs.ratio))
        elif first == "mhmoe":
            rivals[f"{NAMES[second]}, {label}"].append((setting.tokens, 1 / pairs.ratio))
    for (setting, name), peak in results.memory.items():
        memory[f"{NAMES[name]} {setting.dtype}"].append((setting.tokens, peak["tensors"]))
    return panels or [
        (bound, "Our time / GEMM bound (1 = no overhead)", "tokens T", "ratio"),
        (rivals, "Our speed-up (above 1 = ours faster)", "tokens T", "ratio: rival's time / ours"),
        (memory, "Peak memory of a step", "tokens T", "MiB"),
    ]
