"""To how many different experts the sub-tokens of every patch of an image go (P1's figures 8 and 10)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...checkpoints.files import read_trained
from ...checkpoints.open import open_model
from ...common.errors import UserError
from ...common.files import sha256_of
from ...data.images.reading import read_image
from ...data.images.transforms import EvaluationTransform
from .listening import RoutedCall, distinct_experts, expert_layers, listening, most_distinct, num_experts

_FLAT = 0.05  # a patch whose pixels, from -1 to 1, differ by less than this shows one colour
_BATCH = 32


@dataclass(frozen=True)
class PatchDiversity:
    """How one checkpoint routes some images, each shown alone, without text.

    Attributes:
        checkpoint: the file.
        sha256: its digest.
        updates: how long it was trained.
        layers: indices of the MoE layers in the encoder, from 0.
        counts_BLhw: ``(images, layers, rows, columns)``, different experts of each patch's sub-tokens.
        is_flat_Bhw: bool ``(images, rows, columns)``, patches of one colour.
        most: as many experts as there can be: all of a layer, or heads times top-k.
    """

    checkpoint: Path
    sha256: str
    updates: int
    layers: list[int]
    counts_BLhw: Tensor
    is_flat_Bhw: Tensor
    most: int

    def mean(self, layer: int | None = None, flat: bool | None = None) -> float | None:
        """The mean number of experts per patch; None if there is no such patch.

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
            "checkpoint": self.checkpoint.name,
            "checkpoint_sha256": self.sha256,
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
def measure_diversity(checkpoint: Path, data: Path, paths: Sequence[Path]) -> PatchDiversity:
    """Route images and count.

    Args:
        checkpoint: a model of images and text with experts.
        data: its prepared folder.

    Raises:
        UserError, OSError: a dense model or another kind of checkpoint, or an image that cannot be read.
    """
    opened = open_model(checkpoint, data)
    if not hasattr(opened.model, "beit3"):
        raise UserError(f"{checkpoint} is a language model: it has no image patches")
    layers, task = expert_layers(opened.model), opened.task
    if not layers:
        raise UserError(f"{checkpoint} is a dense model: it has no experts to measure")
    images = prepare_images(paths, task.args.img_size)
    experts, counts = num_experts(opened.model, layers[0]), []

    def count(call: RoutedCall) -> None:
        patches = [distinct_experts(call.choices[layer][:, 1:], experts) for layer in layers]
        counts.append(torch.stack([distinct.view(-1, *task.grid) for distinct in patches], dim=1).cpu())

    with listening(opened.model, count):
        for batch in images.split(_BATCH):
            opened.model(images=batch.to(opened.device))
    return PatchDiversity(
        checkpoint=checkpoint,
        sha256=sha256_of(checkpoint),
        updates=num_updates(checkpoint),
        layers=layers,
        counts_BLhw=torch.cat(counts),
        is_flat_Bhw=flat_patches(images, task.args.patch_size),
        most=most_distinct(opened.model),
    )


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


def num_updates(checkpoint: Path) -> int:
    """How many updates a checkpoint was trained for; 0 if it does not say."""
    history = read_trained(checkpoint).get("optimizer_history") or [{}]
    return int(history[-1].get("num_updates", 0))
