"""PNG figures; matplotlib is the optional extra ``plots``."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...common.errors import UserError
from ...common.files import atomic_path
from ...common.tables import percent
from ..routing.activation import ACTIVE_THRESHOLD, Activation, mean
from .aggregate import mean_and_deviation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = tuple[str, Sequence[float], Sequence[float]]


def require_matplotlib() -> None:
    """Raises:
    UserError: with the line that installs it.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("plots need matplotlib: pip install 'mhmoe-fairseq[plots]' (or pip install matplotlib)")


def draw_curves(path: Path, curves: list[Curve], title: str, ylabel: str, log_scale: bool = False) -> None:
    """Values over updates, a line for every run."""
    figure = new_figure(7.0, 4.2)
    axes = figure.subplots()
    for name, updates, values in curves:
        axes.plot(updates, values, marker="o" if len(updates) < 30 else None, markersize=3, label=name)
    axes.set(title=title, xlabel="updates", ylabel=ylabel)
    if log_scale:
        axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    save_figure(figure, path)


def draw_activations(path: Path, activations: dict[str, Activation], threshold: float = ACTIVE_THRESHOLD) -> None:
    """Heat maps, MoE layers by experts, one for every model, on one colour scale (P1's figures 1 and 5)."""
    loads = {name: activation.relative_load() for name, activation in activations.items()}
    highest = min(4.0, max(2.0, *(math.ceil(load.max().item()) for load in loads.values())))
    rows = sum(load.size(0) for load in loads.values())
    figure = new_figure(8.0, 1.1 * len(loads) + 0.35 * rows + 0.6)
    heights = [max(load.size(0), 2) for load in loads.values()]
    all_axes = figure.subplots(len(loads), 1, squeeze=False, height_ratios=heights)
    image: Any = None
    for axes, (name, load) in zip(all_axes[:, 0], loads.items()):
        image = heat_map(axes, load, activations[name].row_names, highest)
        active = percent(mean(activations[name].active(threshold)))
        axes.set(title=f"{name}: {active} active", ylabel="layer", xlabel="expert")
    figure.colorbar(image, ax=all_axes[:, 0].tolist(), label="load, 1 = uniform", extend="max")
    save_figure(figure, path)


def draw_group_loads(path: Path, load_GLE: Tensor, layers: Sequence[int], groups: Sequence[str], title: str) -> None:
    """Heat maps, groups by experts, one for every MoE layer: the loads over the mean of the group.

    Args:
        load_GLE: assignments of every group in every layer.
        layers: places of the layers in the model, from 0.
    """
    relative_GLE = load_GLE / load_GLE.mean(-1, keepdim=True)
    highest = min(4.0, max(2.0, math.ceil(relative_GLE.max().item())))
    columns = 1 if len(layers) == 1 else 2
    rows = math.ceil(len(layers) / columns)
    figure = new_figure(1.0 + 4.2 * columns, 0.8 + rows * (0.6 + 0.2 * len(groups)))
    all_axes = figure.subplots(rows, columns, squeeze=False).flatten()
    image: Any = None
    for place, (axes, layer) in enumerate(zip(all_axes, layers)):
        image = heat_map(axes, relative_GLE[:, place], groups, highest)
        axes.set(title=f"layer {layer + 1}", xlabel="expert")
    for axes in all_axes[len(layers) :]:
        axes.set_axis_off()
    figure.suptitle(title)
    figure.colorbar(image, ax=all_axes.tolist(), label="load, 1 = uniform", extend="max")
    save_figure(figure, path)


def heat_map(axes: Any, values: Tensor, rows: Sequence[str], highest: float, lowest: float = 0.0) -> Any:
    """A matrix, coloured from ``lowest`` to ``highest``; the image, for a colour bar."""
    axes.set_yticks(range(len(rows)), rows)
    return axes.imshow(values.numpy(), aspect="auto", vmin=lowest, vmax=highest, interpolation="nearest")


def draw_error_bars(path: Path, values: dict[str, list[float]], title: str, ylabel: str) -> None:
    """Mean and standard deviation of every model, and each seed as a dot."""
    figure = new_figure(1.6 + 1.3 * len(values), 4.2)
    axes = figure.subplots()
    for place, seeds in enumerate(values.values()):
        middle, deviation = mean_and_deviation(seeds)
        axes.errorbar(place, middle, yerr=deviation, fmt="_", color="black", markersize=18, capsize=6)
        axes.plot([place] * len(seeds), seeds, "o", alpha=0.6, markersize=5)
    axes.set_xticks(range(len(values)), list(values), rotation=20, ha="right")
    axes.set(title=title, ylabel=ylabel, xlim=(-0.5, len(values) - 0.5))
    axes.grid(alpha=0.3, axis="y")
    save_figure(figure, path)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches.

    Raises:
        UserError: without matplotlib.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
