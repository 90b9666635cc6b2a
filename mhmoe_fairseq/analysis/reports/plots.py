"""PNG plots of metrics, of experts' loads and of images; matplotlib is the optional extra ``plots``."""

import contextlib
import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...common.errors import UserError
from ...common.files import atomic_path
from .runs import mean_and_deviation

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Name of the file, the function that draws it, values, title, and what the vertical axis or rows and columns are.
Plot = tuple[str, Callable[[Path, Any, str, Any], None], Any, str, Any]


def draw_all(folder: Path, plots: Iterable[Plot]) -> Iterator[tuple[str, Path]]:
    """Draw plots into a folder; yields title and file of each."""
    for plot in plots:
        _, draw, values, title, label = plot
        path = folder / file_of(plot)
        draw(path, values, title, label)
        yield title, path


def file_of(plot: Plot) -> str:
    """The name of the file that a plot is drawn into."""
    return f"{plot[0].replace(' ', '-').replace('/', '-per-')}.png"


def require_matplotlib() -> None:
    """Raise ``UserError`` with the line that installs matplotlib, where it is not there."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("plots need matplotlib: pip install 'mhmoe-fairseq[plots]' (or pip install matplotlib)")


def draw_curves(path: Path, curves: Mapping[str, Sequence[tuple[float, float]]], title: str, ylabel: str) -> None:
    """Draw a line for every curve (name -> updates and value of each point); a perplexity on a logarithmic scale."""
    with _figure(path, 7.0, 4.2) as figure:
        axes = figure.subplots()
        for name, points in curves.items():
            axes.plot(*zip(*points), marker="o" if len(points) < 30 else None, markersize=3, label=name)
        axes.set(title=title, xlabel="updates", ylabel=ylabel)
        if ylabel == "perplexity":
            axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)


def draw_bars(path: Path, values: Mapping[str, Mapping[str, Sequence[float]]], title: str, ylabel: str) -> None:
    """Draw bars of model -> part, such as a language -> a value for each seed: means with their standard deviation."""
    parts = list(dict.fromkeys(part for by_part in values.values() for part in by_part))
    width = 1 / (len(values) + 1)
    with _figure(path, 2.0 + 0.25 * len(parts) * (len(values) + 1), 4.2) as figure:
        axes = figure.subplots()
        for index, (model, by_part) in enumerate(values.items()):
            measured = [(at, *mean_and_deviation(by_part[name])) for at, name in enumerate(parts) if by_part.get(name)]
            axes.bar(
                [at + (index - (len(values) - 1) / 2) * width for at, _, _ in measured],
                [middle for _, middle, _ in measured],
                width,
                yerr=[deviation or 0.0 for _, _, deviation in measured],
                error_kw={"elinewidth": 0.8},
                label=model,
            )
        axes.set_xticks(range(len(parts)), parts)
        axes.set(title=title, ylabel=ylabel)
        axes.grid(alpha=0.3, axis="y")
        axes.legend(fontsize=8)


def draw_seeds(path: Path, values: Mapping[str, Sequence[float]], title: str, ylabel: str) -> None:
    """Draw mean and standard deviation of every model, and each seed as a dot."""
    with _figure(path, 1.6 + 1.3 * len(values), 4.2) as figure:
        axes = figure.subplots()
        for index, seeds in enumerate(values.values()):
            middle, deviation = mean_and_deviation(seeds)
            axes.errorbar(index, middle, yerr=deviation, fmt="_", color="black", markersize=18, capsize=6)
            axes.plot([index] * len(seeds), seeds, "o", alpha=0.6, markersize=5)
        axes.set_xticks(range(len(values)), list(values), rotation=20, ha="right")
        axes.set(title=title, ylabel=ylabel, xlim=(-0.5, len(values) - 0.5))
        axes.grid(alpha=0.3, axis="y")


def draw_changes(path: Path, rows: Mapping[str, tuple[str, Sequence[float]]], title: str, xlabel: str) -> None:
    """Draw an interval for every row, coloured by its verdict, and what a paper has as a circle.

    Args:
        rows: name -> verdict; lowest, middle and highest value and, where there is one, the paper's.
    """
    verdicts = sorted({verdict for verdict, _ in rows.values()})
    with _figure(path, 9.0, 1.2 + 0.24 * len(rows)) as figure:
        axes = figure.subplots()
        for index, verdict in enumerate(verdicts):
            found = [(at, values) for at, (of, values) in enumerate(rows.values()) if of == verdict]
            at, middles = [at for at, _ in found], [values[1] for _, values in found]
            sides = [[abs(values[side] - values[1]) for _, values in found] for side in (0, 2)]
            axes.errorbar(middles, at, xerr=sides, fmt="o", markersize=4, capsize=3, color=f"C{index}", label=verdict)
        of_paper = [(values[3], at) for at, (_, values) in enumerate(rows.values()) if len(values) > 3]
        if of_paper:
            axes.plot(*zip(*of_paper), "o", color="black", fillstyle="none", markersize=6, label="paper")
        axes.axvline(0.0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
        axes.set(title=title, xlabel=xlabel, ylim=(len(rows) - 0.5, -0.5))
        axes.grid(alpha=0.3, axis="x")
        axes.legend(fontsize=8)


def draw_scaling(
    path: Path, lines: Mapping[str, Mapping[int, Sequence[float]]], title: str, axis_labels: tuple[str, str]
) -> None:
    """Draw a line for every model over sizes, such as experts (P1's figure 6), on a logarithmic axis.

    Args:
        lines: name -> size -> a value for each seed: means with their standard deviation.
        axis_labels: of the sizes and of the values.
    """
    sizes = [size for line in lines.values() for size in line]
    ticks = [2**power for power in range(math.floor(math.log2(min(sizes))), math.ceil(math.log2(max(sizes))) + 1)]
    with _figure(path, 7.0, 4.2) as figure:
        axes = figure.subplots()
        for name, line in lines.items():
            middles, deviations = zip(*(mean_and_deviation(line[size]) for size in sorted(line)))
            bars = [math.nan if deviation is None else deviation for deviation in deviations]
            axes.errorbar(sorted(line), middles, bars, marker="o", markersize=4, capsize=3, label=name)
        axes.set_xscale("log")
        axes.set_xticks(ticks, list(map(str, ticks)))
        axes.set_xticks([], minor=True)
        axes.set(title=title, xlabel=axis_labels[0], ylabel=axis_labels[1])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)


def draw_distributions(path: Path, groups: Mapping[str, Sequence[float]], title: str, xlabel: str) -> None:
    """Draw a histogram of every group's values, shares of the group in common bins, with its mean as a line."""
    together = np.concatenate([np.asarray(values, dtype=float) for values in groups.values()])
    edges = np.histogram_bin_edges(together, 24).tolist()
    with _figure(path, 7.0, 4.2) as figure:
        axes = figure.subplots()
        for index, (name, values) in enumerate(groups.items()):
            weights, colour = np.full(len(values), 100 / len(values)), f"C{index}"
            axes.hist(values, edges, weights=weights, alpha=0.5, color=colour, label=f"{name}, n = {len(values)}")
            axes.axvline(float(np.mean(values)), color=colour, linestyle="--")
        axes.set(title=title, xlabel=xlabel, ylabel="% of the words")
        axes.grid(alpha=0.3, axis="y")
        axes.legend(fontsize=8)


def relative_load(loads_RE: Any) -> np.ndarray:
    """Each expert's share of its row's assignments times E, ``(rows, E)`` float64; 1 is uniform."""
    loads_RE = np.asarray(loads_RE, dtype=np.float64)
    return loads_RE / np.maximum(loads_RE.mean(-1, keepdims=True), np.finfo(np.float64).tiny)


def draw_loads(path: Path, maps: Mapping[str, Mapping[str, Sequence[float]]], title: str, ylabel: str) -> None:
    """Draw relative loads as heat maps (title -> row -> load of each expert) on one scale (P1's figures 1 and 5)."""
    relative = {name: relative_load(list(rows.values())) for name, rows in maps.items()}
    highest = min(4.0, max(2.0, *(math.ceil(load_RE.max()) for load_RE in relative.values())))
    heights = [max(len(rows), 2) for rows in maps.values()]
    with _figure(path, 8.0, 1.1 * len(maps) + 0.35 * sum(heights) + 0.6) as figure:
        all_axes = figure.subplots(len(maps), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (name, rows) in zip(all_axes, maps.items()):
            image = _heat_map(axes, relative[name], list(rows), highest)
            axes.set(title=name, ylabel=ylabel, xlabel="expert")
        figure.suptitle(title)
        figure.colorbar(image, ax=all_axes.tolist(), label="load, 1 = uniform", extend="max")


def draw_matrices(path: Path, matrices: Mapping[str, np.ndarray], title: str, names: Sequence[str]) -> None:
    """Draw matrices ``(G, G)`` of shares from 0 to 1, by their titles side by side, rows and columns of G names."""
    size = 2.2 + 0.3 * len(names)
    with _figure(path, len(matrices) * size, size) as figure:
        all_axes = figure.subplots(1, len(matrices), squeeze=False)[0]
        for axes, (name, values_GG) in zip(all_axes, matrices.items()):
            lowest = math.floor(10 * values_GG.min().item()) / 10
            image = _heat_map(axes, values_GG, names, highest=1.0, lowest=lowest)
            axes.set_xticks(range(len(names)), names, rotation=90)
            axes.set_title(name, fontsize=9)
            figure.colorbar(image, ax=axes)
        figure.suptitle(title)


def _heat_map(axes: Any, values: np.ndarray, rows: Sequence[str], highest: float, lowest: float = 0.0) -> Any:
    """Draw a matrix, coloured from ``lowest`` to ``highest``; returns the image, for a colour bar."""
    axes.set_yticks(range(len(rows)), rows)
    return axes.imshow(values, aspect="auto", vmin=lowest, vmax=highest, interpolation="nearest")


def draw_overlays(path: Path, images: Sequence[Any], rows: Mapping[str, np.ndarray], title: str) -> None:
    """Draw images above, and below, for every row, a map over each image.

    All maps have one scale, from 1 expert to as many as the most diverse patch has.

    Args:
        images: B images of Pillow, all of one size.
        rows: name -> ``(B, h, w)`` experts of each patch.
    """
    width, height = images[0].size
    highest = max(1.01, *(float(values_Bhw.max()) for values_Bhw in rows.values()))
    with _figure(path, 1.3 + 1.3 * len(images), 0.9 + 1.35 * (1 + len(rows))) as figure:
        all_axes = figure.subplots(1 + len(rows), len(images), squeeze=False)
        for axes_of_row, (name, values_Bhw) in zip(all_axes, {"image": None, **rows}.items()):
            for index, (axes, image) in enumerate(zip(axes_of_row, images)):
                axes.imshow(image if values_Bhw is None else image.convert("L"), cmap="gray", vmin=0, vmax=255)
                axes.set(xticks=[], yticks=[])
                if values_Bhw is not None:
                    overlay = axes.imshow(
                        values_Bhw[index], extent=(-0.5, width - 0.5, height - 0.5, -0.5), alpha=0.75,
                        vmin=1, vmax=highest, cmap="viridis", interpolation="nearest",
                    )  # fmt: skip
            axes_of_row[0].set_ylabel(name, fontsize=8)
        figure.colorbar(overlay, ax=all_axes[1:].ravel().tolist(), label="experts per patch, mean of the layers")
        figure.suptitle(title, fontsize=10)


@contextlib.contextmanager
def _figure(path: Path, width: float, height: float) -> Iterator["Figure"]:
    """An empty figure, so many inches wide and high; what is drawn becomes a PNG, whole or not at all."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
