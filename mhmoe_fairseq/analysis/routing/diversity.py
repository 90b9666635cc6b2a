"""To how many different experts the sub-tokens of every patch of an image go (P1's figures 8 and 10)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...checkpoints.open import open_model
from ...common.errors import UserError
from ...data.images.reading import read_image
from ...data.images.transforms import EvaluationTransform
from .listening import RoutedCall, expert_pools, listening, most_distinct

_FLAT = 0.05  # a patch whose pixels, from -1 to 1, differ by less than this shows one colour
_BATCH = 32


@torch.no_grad()
def measure_diversity(
    checkpoint: dict[str, Any], data: Path, images: Tensor, device: str | None = None, precision: str | None = None
) -> dict[str, Any]:
    """Route images, each shown alone, without text, and count the experts of every patch.

    Args:
        checkpoint: what ``describe_checkpoint`` says of a model of images and text with experts.
        images: ``(B, 3, H, W)`` as ``prepare_images`` gives them.
        device, precision: see ``open_model``.

    Returns:
        ready for JSON: the checkpoint; ``layers``, indices of the MoE layers from 0; ``most``, how many experts a patch
        can have; ``counts`` by image, layer, row and column; and their means, of patches of one colour (``mean_flat``)
        and of the others (``mean_drawn``), None where there are none, and by layer.

    Raises:
        UserError: it is a dense model.
    """
    opened = open_model(checkpoint["path"], data, device, precision=precision)
    layers, task = list(expert_pools(opened.model)), opened.task
    if not layers:
        raise UserError(f"{checkpoint['path']} is a dense model: it has no experts to measure")
    counts = []

    def count(call: RoutedCall) -> None:
        patches = [call.distinct(layer)[:, 1:].view(-1, *task.grid) for layer in layers]
        counts.append(torch.stack(patches, dim=1).cpu())

    with listening(opened.model, count):
        for batch in images.split(_BATCH):
            opened.model(images=batch.to(opened.device))
    counts_BLhw, is_flat_Bhw = torch.cat(counts), flat_patches(images, task.args.patch_size)
    means_Bhw = counts_BLhw.double().mean(1)
    flat, drawn = means_Bhw[is_flat_Bhw], means_Bhw[~is_flat_Bhw]
    return {
        "checkpoint": Path(checkpoint["path"]).name,
        "checkpoint_sha256": checkpoint["sha256"],
        "updates": checkpoint["updates"] or 0,
        "layers": layers,
        "most": most_distinct(opened.model),
        "mean": float(means_Bhw.mean()),
        "mean_flat": float(flat.mean()) if len(flat) else None,
        "mean_drawn": float(drawn.mean()) if len(drawn) else None,
        "mean_by_layer": counts_BLhw.double().mean((0, 2, 3)).tolist(),
        "counts": counts_BLhw.tolist(),
    }


def prepare_images(paths: Sequence[Path], size: int) -> Tensor:
    """The images as evaluation sees them, ``(B, 3, size, size)``."""
    transform = EvaluationTransform(size)
    return torch.stack([transform(read_image(path)) for path in paths])


def shown(image: Tensor) -> Image.Image:
    """An image of Pillow with what the model sees: ``(3, H, W)`` of -1 to 1."""
    pixels = ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def flat_patches(images: Tensor, patch_size: int) -> Tensor:
    """Which patches show one colour: ``(B, 3, H, W) -> bool (B, rows, columns)``."""
    patches = images.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size).flatten(4)
    return (patches.amax(-1) - patches.amin(-1)).amax(1) < _FLAT
