"""What a benchmark of the layer found out, the targets that it decides, its report and plot."""

import importlib.util
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mhmoe_fairseq.common.files import atomic_path

from .console import table, verdict, write_report
from .layers import NAMES, Setting
from .timing import Pairs

BOUND_LIMITS = {8: 1.20, 32: 1.25}
MEMORY_LIMIT = 0.8
MIXTRAL_SPEEDUP = 1.8
LINEARITY = 1.05
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
        memory: peak MiB by setting and contender: ``tensors``, and ``resident`` where the system tells it.
        breakdowns: by setting, operators with milliseconds per step and share.
        errors: what was verified, with the largest relative error.
    """

    times: dict[tuple[Setting, str, str], Pairs] = field(default_factory=dict)
    memory: dict[tuple[Setting, str], dict[str, float | None]] = field(default_factory=dict)
    breakdowns: dict[str, list[tuple[str, float, float]]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Target:
    """One promise and what became of it."""

    promise: str
    measured: str
    met: bool


def targets(results: Results) -> list[Target]:
    """The promises that the measured settings can decide; settings of other sizes decide none."""
    return [*_time_targets(results), *_memory_targets(results)]


def _time_targets(results: Results) -> Iterator[Target]:
    limits = [
        *((2048, e, "gemm", limit, f"forward + backward at most {limit:.2f}x the GEMM bound")
          for e, limit in BOUND_LIMITS.items()),
        *((tokens, 8, "loop", 1.0, "no slower than the plain loop") for tokens in (2048, 4096)),
        *((2048, e, "mixtral-grouped", 1 / MIXTRAL_SPEEDUP,
           f"at least {MIXTRAL_SPEEDUP}x as fast as {NAMES['mixtral-grouped']}") for e in BOUND_LIMITS),
    ]  # fmt: skip
    for tokens, experts, rival, limit, promise in limits:
        if pairs := results.times.get((Setting(tokens, experts), "mhmoe", rival)):
            measured = f"{pairs.ratio:.2f}x its time {pairs.range_text()}, {1 / pairs.ratio:.2f}x its speed"
            yield Target(f"{promise} (T={tokens}, E={experts}, fp32)", measured, pairs.ratio <= limit)


def _memory_targets(results: Results) -> Iterator[Target]:
    limit = 4 * LINEARITY
    comparisons = [
        *((tokens, "mhmoe", tokens, "loop", MEMORY_LIMIT,
           f"peak memory at most {MEMORY_LIMIT}x the plain loop's (T={tokens}, E=8, fp32)") for tokens in (2048, 4096)),
        (8192, "mhmoe", 2048, "mhmoe", limit, f"peak memory linear in T (T=8192 needs at most {limit:.1f}x of T=2048)"),
    ]  # fmt: skip
    for tokens, name, other_tokens, other_name, limit, promise in comparisons:
        ours = results.memory.get((Setting(tokens, 8), name))
        other = results.memory.get((Setting(other_tokens, 8), other_name))
        if ours and other:
            ratios = {what: ours[what] / other[what] for what in ("tensors", "resident") if ours[what] and other[what]}
            measured = ", ".join(f"{w} {ours[w]:.0f} / {other[w]:.0f} MiB = {r:.2f}x" for w, r in ratios.items())
            yield Target(promise, measured, max(ratios.values()) <= limit)


def write_layer_report(path: Path, results: Results, *, threads: int, pairs: int, complete: bool) -> None:
    """Replace the report at ``path`` by what is known, ``complete`` or not yet."""
    title = "MH-MoE layer benchmark" + ("" if complete else " (incomplete: the run is going on or was interrupted)")
    decided = [(target.promise, target.measured, verdict(target.met)) for target in targets(results)]
    errors = [f"- {what}: {error:.1e}" for what, error in results.errors.items()]
    parts = [
        "## Targets",
        table(("target", "measured", "verdict"), decided) if decided else "None of the target settings was measured.",
        "## How it was measured",
        METHOD.format(pairs=pairs),
        "Checked before timing, largest relative error over output and gradients (limit 1e-5):" if errors else "",
        "\n".join(errors) or "Nothing was verified in this run.",
        "## Time",
        *(_times(results) or ["Nothing was timed."]),
        "## Peak memory (MiB)",
        _memory(results) if results.memory else "Nothing was measured.",
        "## Where our time goes",
        *(_breakdowns(results) or ["Nothing was profiled."]),
    ]
    if results.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in results.notes)]
    if complete and path.with_suffix(".png").exists():
        parts.append(f"![Time and memory]({path.with_suffix('.png').name})")
    write_report(path, title, threads, filter(None, parts))


def _order(setting: Setting) -> tuple[bool, int, int]:
    return setting.dtype != "fp32", setting.num_experts, setting.tokens


def _times(results: Results) -> list[str]:
    rows: dict[Setting, list[tuple[str, ...]]] = defaultdict(list)
    for (setting, first, second), pairs in results.times.items():
        rows[setting].append((
            NAMES[first], NAMES[second], f"{pairs.first_median * 1e3:.1f}", f"{pairs.second_median * 1e3:.1f}",
            f"**{pairs.ratio:.2f}** {pairs.range_text()}", f"{1 / pairs.ratio:.2f}x",
            f"{setting.flops() / pairs.first_median / 1e9:.0f}",
        ))  # fmt: skip
    head = ("ours", "rival", "ours ms", "rival ms", "ours / rival (pairs)", "speed-up", "ours GFLOP/s")
    parts = []
    for setting in sorted(rows, key=_order):
        parts += [f"### {setting.label()} ({setting.flops() / 1e9:.0f} GFLOP)", table(head, rows[setting])]
    return parts


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
    return table(("setting", "contender", "tensors", "resident", "tensors / plain loop's", "KiB per token"), rows)


def _breakdowns(results: Results) -> list[str]:
    parts = []
    for label, operators in results.breakdowns.items():
        rows = [(f"`{name}`", f"{milliseconds:.1f}", f"{share:.1%}") for name, milliseconds, share in operators]
        parts += [f"### {label}", table(("operator", "ms per step", "share"), rows)]
    return parts


def write_plot(path: Path, results: Results) -> bool:
    """Time against the bound and the rivals, and peak memory, over the number of tokens; False without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    bound, rivals, memory = lines = [defaultdict(list) for _ in range(3)]
    fewest = min((setting.num_experts for setting, *_ in results.times), default=0)
    for (setting, first, second), pairs in results.times.items():
        if first == "mhmoe" and second == "gemm":
            bound[f"E={setting.num_experts} {setting.dtype}"].append((setting.tokens, pairs.ratio))
        elif first == "mhmoe" and (setting.dtype, setting.num_experts) == ("fp32", fewest):
            rivals[NAMES[second]].append((setting.tokens, 1 / pairs.ratio))
    for (setting, name), peak in results.memory.items():
        if setting.dtype == "fp32":
            memory[NAMES[name]].append((setting.tokens, peak["tensors"]))
    titles = (
        ("Our time / GEMM bound (1 = no overhead)", "ratio"),
        ("Our speed-up, fp32, fewest experts (above 1 = ours faster)", "rival's time / ours"),
        ("Peak memory of a step, fp32", "MiB"),
    )
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    for axes, points_of, (title, label) in zip(figure.subplots(1, 3), lines, titles):
        for name, points in points_of.items():
            axes.plot(*zip(*sorted(points)), marker="o", label=name)
        axes.set(title=title, xlabel="tokens T", ylabel=label)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        if label == "MiB":
            axes.set_yscale("log")
        else:
            axes.axhline(1.0, color="grey", linewidth=1)
        if points_of:
            axes.legend(fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return True
