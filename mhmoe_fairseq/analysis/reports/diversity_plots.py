"""Images with the diversity of their patches' experts laid over them, one row for every checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..routing.diversity import PatchDiversity, shown
from .plots import draw_curves, new_figure, save_figure

_OPACITY = 0.75


def draw_overlays(path: Path, images: Tensor, measured: Sequence[PatchDiversity], title: str) -> None:
    """The images above, and below for every checkpoint a map over each: mean of the MoE layers.

    All maps have one scale, from 1 expert to as many as the most diverse patch has.

    Args:
        images: ``(B, 3, H, W)`` of -1 to 1.
    """
    size = images.size(-1)
    highest = max(float(diversity.counts_BLhw.double().mean(1).max()) for diversity in measured)
    figure = new_figure(1.3 + 1.3 * len(images), 0.9 + 1.35 * (1 + len(measured)))
    all_axes = figure.subplots(1 + len(measured), len(images), squeeze=False)
    drawn = [shown(image) for image in images]
    overlay: Any = None
    for row, axes_of_row in enumerate(all_axes):
        for index, (axes, image) in enumerate(zip(axes_of_row, drawn)):
            axes.imshow(image.convert("L") if row else image, cmap="gray", vmin=0, vmax=255)
            axes.set(xticks=[], yticks=[])
            if row:
                counts_hw = measured[row - 1].counts_BLhw[index].double().mean(0)
                overlay = axes.imshow(
                    counts_hw.numpy(), extent=(-0.5, size - 0.5, size - 0.5, -0.5), alpha=_OPACITY,
                    vmin=1, vmax=max(highest, 1.01), cmap="viridis", interpolation="nearest",
                )  # fmt: skip
        name = "image" if not row else f"{measured[row - 1].updates:,}\nupdates"
        axes_of_row[0].set_ylabel(name, fontsize=8)
    figure.colorbar(overlay, ax=all_axes[1:].ravel().tolist(), label="experts per patch, mean of the layers")
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def draw_course(path: Path, measured: Sequence[PatchDiversity], title: str) -> None:
    """Mean number of experts per patch over the updates: patches of one colour, and the others."""
    curves = []
    for name, flat in (("patches of one colour", True), ("other patches", False)):
        points = [(diversity.updates, diversity.mean(flat=flat)) for diversity in measured]
        known = [(updates, value) for updates, value in points if value is not None]
        if known:
            curves.append((name, *map(list, zip(*known))))
    draw_curves(path, curves, title, "experts per patch, mean of the layers")
