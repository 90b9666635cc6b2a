"""One PNG: time against the GEMM bound, and peak memory, over the number of tokens."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path

from .contenders import NAMES
from .records import Results

MARKERS = {"mhmoe": "o", "loop": "s", "torchscale": "^", "mixtral-grouped": "D", "mixtral-eager": "v"}


def has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def _bound_points(results: Results) -> dict[str, list[tuple[int, float]]]:
    """ours / bound over T, a line for each number of experts and dtype."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for record in results.times:
        if (record.first, record.second) == ("mhmoe", "gemm"):
            label = f"E={record.setting.num_experts} {record.setting.dtype}"
            lines.setdefault(label, []).append((record.setting.tokens, record.pairs.ratio))
    return lines


def _rival_points(results: Results) -> dict[str, list[tuple[int, float]]]:
    """rival / ours over T for the rivals, at the fewest experts in float32."""
    points = [r for r in results.times if r.first == "mhmoe" and r.second != "gemm" and r.setting.dtype == "fp32"]
    fewest = min((record.setting.num_experts for record in points), default=0)
    lines: dict[str, list[tuple[int, float]]] = {}
    for record in points:
        if record.setting.num_experts == fewest:
            lines.setdefault(record.second, []).append((record.setting.tokens, 1 / record.pairs.ratio))
    return lines


def _memory_points(results: Results) -> dict[str, list[tuple[int, float]]]:
    lines: dict[str, list[tuple[int, float]]] = {}
    for record in results.memory:
        if record.setting.dtype == "fp32":
            lines.setdefault(record.name, []).append((record.setting.tokens, record.tensors))
    return lines


def write_plot(path: Path, results: Results) -> bool:
    """Draw to ``path``; False where matplotlib is missing."""
    if not has_matplotlib():
        return False
    import matplotlib

    matplotlib.use("Agg")
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # a rival's import sets the root logger to DEBUG
    from matplotlib import pyplot

    figure, (bound, rivals, memory) = pyplot.subplots(1, 3, figsize=(15, 4.5), constrained_layout=True)
    for label, points in _bound_points(results).items():
        bound.plot(*zip(*sorted(points)), marker="o", label=label)
    for name, points in _rival_points(results).items():
        rivals.plot(*zip(*sorted(points)), marker=MARKERS[name], label=NAMES[name])
    for name, points in _memory_points(results).items():
        memory.plot(*zip(*sorted(points)), marker=MARKERS[name], label=NAMES[name])
    bound.axhline(1.0, color="grey", linewidth=1)
    rivals.axhline(1.0, color="grey", linewidth=1)
    bound.set(title="Our time / GEMM bound (1 = no overhead)", ylabel="ratio")
    rivals.set(title="Our speed-up, fp32, fewest experts (above 1 = ours faster)", ylabel="rival's time / ours")
    memory.set(title="Peak memory of a step, fp32", ylabel="MiB", yscale="log")
    for axes in (bound, rivals, memory):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens T")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)
    os.replace(temporary, path)
    return True
