"""To how many different experts the sub-tokens of every patch of an image go (P1's figures 8 and 10)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...checkpoints.open import open_model
from ...common.errors import UserError
from ...data.images.reading import read_image
from ...data.images.transforms import EvaluationTransform
from .listening import RoutedCall, expert_layers, listening, most_distinct

_FLAT = 0.05  # a patch whose pixels, from -1 to 1, differ by less than this shows one colour
_BATCH = 32


@dataclass(frozen=True)
class PatchDiversity:
    """How one checkpoint routes some images, each shown alone, without text.

    Attributes:
        checkpoint: path, SHA-256 and number of updates, as ``describe_checkpoint`` gives them.
        layers: indices of the MoE layers in the encoder, from 0.
        counts_BLhw: ``(images, layers, rows, columns)``, different experts of each patch's sub-tokens.
        is_flat_Bhw: bool ``(images, rows, columns)``, patches of one colour.
        most: as many experts as there can be: all of a layer, or heads times top-k.
    """

    checkpoint: dict[str, Any]
    layers: list[int]
    counts_BLhw: Tensor
    is_flat_Bhw: Tensor
    most: int

    @property
    def updates(self) -> int:
        """How long it was trained; 0 if it does not say."""
        return self.checkpoint["updates"] or 0

    def mean(self, layer: int | None = None, flat: bool | None = None) -> float | None:
        """Return the mean number of experts per patch, None if there is no such patch.

        Args:
            layer: an index into ``layers``; None for all of them.
            flat: patches of one colour, or the others; None for all.
        """
        counts_BLhw = self.counts_BLhw if layer is None else self.counts_BLhw[:, layer : layer + 1]
        counts_Bhw = counts_BLhw.double().mean(1)
        if flat is not None:
            counts_Bhw = counts_Bhw[self.is_flat_Bhw == flat]
        return float(counts_Bhw.mean()) if counts_Bhw.numel() else None

    def as_json(self) -> dict[str, Any]:
        """The counts and their means, ready for JSON."""
        return {
            "checkpoint": Path(self.checkpoint["path"]).name,
            "checkpoint_sha256": self.checkpoint["sha256"],
            "updates": self.updates,
            "layers": self.layers,
            "most": self.most,
            "mean": self.mean(),
            "mean_flat": self.mean(flat=True),
            "mean_drawn": self.mean(flat=False),
            "mean_by_layer": [self.mean(index) for index in range(len(self.layers))],
            "counts": self.counts_BLhw.tolist(),
        }


@torch.no_grad()
def measure_diversity(checkpoint: dict[str, Any], data: Path, images: Tensor) -> PatchDiversity:
    """Route images and count; ``UserError`` for a dense model.

    Args:
        checkpoint: what ``describe_checkpoint`` says of a model of images and text with experts.
        images: ``(B, 3, H, W)`` as ``prepare_images`` gives them.
    """
    opened = open_model(checkpoint["path"], data)
    layers, task = expert_layers(opened.model), opened.task
    if not layers:
        raise UserError(f"{checkpoint['path']} is a dense model: it has no experts to measure")
    counts = []

    def count(call: RoutedCall) -> None:
        patches = [call.distinct(layer)[:, 1:].view(-1, *task.grid) for layer in layers]
        counts.append(torch.stack(patches, dim=1).cpu())

    with listening(opened.model, count):
        for batch in images.split(_BATCH):
            opened.model(images=batch.to(opened.device))
    is_flat_Bhw = flat_patches(images, task.args.patch_size)
    return PatchDiversity(checkpoint, layers, torch.cat(counts), is_flat_Bhw, most_distinct(opened.model))


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
