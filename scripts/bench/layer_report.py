"""What a benchmark of the layer found out, the targets that it decides, its report and plot."""

import importlib.util
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mhmoe_fairseq.common.files import atomic_path
from mhmoe_fairseq.common.tables import markdown_table

from .console import Target, write_report
from .contenders import NAMES, Setting
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


def targets(results: Results) -> Iterator[Target]:
    """Yields the promises that the measured settings can decide; settings of other sizes decide none."""
    faster = f"at least {MIXTRAL_SPEEDUP}x as fast as {NAMES['mixtral-grouped']}"
    bound = "forward + backward at most {:.2f}x the GEMM bound".format
    for tokens, experts, rival, limit, promise in [
        *((2048, experts, "gemm", limit, bound(limit)) for experts, limit in BOUND_LIMITS.items()),
        *((tokens, 8, "loop", 1.0, "no slower than the plain loop") for tokens in (2048, 4096)),
        *((2048, experts, "mixtral-grouped", 1 / MIXTRAL_SPEEDUP, faster) for experts in BOUND_LIMITS),
    ]:
        if pairs := results.times.get((Setting(tokens, experts), "mhmoe", rival)):
            measured = f"{pairs.ratio:.2f}x its time {pairs.range_text()}, {1 / pairs.ratio:.2f}x its speed"
            yield f"{promise} (T={tokens}, E={experts}, fp32): {measured}", pairs.ratio <= limit
    linear = f"peak memory linear in T (T=8192 needs at most {4 * LINEARITY:.1f}x of T=2048)"
    less = f"peak memory at most {MEMORY_LIMIT}x the plain loop's (T={{}}, E=8, fp32)".format
    for tokens, other, limit, promise in [
        *((tokens, (tokens, "loop"), MEMORY_LIMIT, less(tokens)) for tokens in (2048, 4096)),
        (8192, (2048, "mhmoe"), 4 * LINEARITY, linear),
    ]:
        ours = results.memory.get((Setting(tokens, 8), "mhmoe"))
        theirs = results.memory.get((Setting(other[0], 8), other[1]))
        if ours and theirs:
            both = [what for what in ("tensors", "resident") if ours[what] and theirs[what]]
            ratios = {what: ours[what] / theirs[what] for what in both}
            texts = [f"{what} {ours[what]:.0f} / {theirs[what]:.0f} MiB = {of:.2f}x" for what, of in ratios.items()]
            yield f"{promise}: {', '.join(texts)}", max(ratios.values()) <= limit


def write_layer_report(path: Path, results: Results, *, threads: int, pairs: int, complete: bool) -> None:
    """Replace the report at ``path`` by what is known, ``complete`` or not yet."""
    title = "MH-MoE layer benchmark" + ("" if complete else " (incomplete: the run is going on or was interrupted)")
    errors = [f"- {what}: {error:.1e}" for what, error in results.errors.items()]
    parts = [
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
    write_report(path, title, threads, list(targets(results)), parts)


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
        parts += [f"### {setting.label()} ({setting.flops() / 1e9:.0f} GFLOP)", markdown_table(head, rows[setting])]
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
    head = ("setting", "contender", "tensors", "resident", "tensors / plain loop's", "KiB per token")
    return markdown_table(head, rows)


def _breakdowns(results: Results) -> list[str]:
    parts = []
    for label, operators in results.breakdowns.items():
        rows = [(f"`{name}`", f"{milliseconds:.1f}", f"{share:.1%}") for name, milliseconds, share in operators]
        parts += [f"### {label}", markdown_table(("operator", "ms per step", "share"), rows)]
    return parts


def write_plot(path: Path, results: Results) -> bool:
    """Time against the bound and the rivals, and peak memory, over the number of tokens; False without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    bound, rivals, memory = (defaultdict(list) for _ in range(3))
    fewest = min((setting.num_experts for setting, *_ in results.times), default=0)
    for (setting, first, second), pairs in results.times.items():
        if (first, second) == ("mhmoe", "gemm"):
            bound[f"E={setting.num_experts} {setting.dtype}"].append((setting.tokens, pairs.ratio))
        elif (first, setting.dtype, setting.num_experts) == ("mhmoe", "fp32", fewest):
            rivals[NAMES[second]].append((setting.tokens, 1 / pairs.ratio))
    for (setting, name), peak in results.memory.items():
        if setting.dtype == "fp32":
            memory[NAMES[name]].append((setting.tokens, peak["tensors"]))
    panels = (
        (bound, "Our time / GEMM bound (1 = no overhead)", "ratio", "linear"),
        (rivals, "Our speed-up, fp32, fewest experts (above 1 = ours faster)", "rival's time / ours", "linear"),
        (memory, "Peak memory of a step, fp32", "MiB", "log"),
    )
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    for axes, (lines, title, label, scale) in zip(figure.subplots(1, 3), panels):
        for name, points in lines.items():
            axes.plot(*zip(*sorted(points)), marker="o", label=name)
        axes.set(title=title, xlabel="tokens T", ylabel=label, yscale=scale)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        if scale == "linear":
            axes.axhline(1.0, color="grey", linewidth=1)
        if lines:
            axes.legend(fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return True
