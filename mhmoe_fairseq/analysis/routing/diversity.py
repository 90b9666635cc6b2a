"""To how many different experts the sub-tokens of every patch of an image go (P1's figures 8 and 10)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...checkpoints.files import read_checkpoint
from ...common.errors import UserError
from ...common.files import sha256_of
from ...data.images.reading import read_image
from ...data.images.transforms import EvaluationTransform
from .activation import load_moe_model
from .expert_choices import distinct_experts, expert_layers, recorded_choices

_FLAT = 0.05  # a patch whose pixels, from -1 to 1, differ by less than this shows one colour
_BATCH = 32


@dataclass(frozen=True)
class PatchDiversity:
    """One checkpoint's routing of some images, each shown alone, without text.

    Attributes:
        checkpoint: the file.
        sha256: of it.
        updates: how long it was trained.
        layers: places of the MoE layers in the encoder, from 0.
        counts_BLhw: ``(images, layers, rows, columns)``, different experts of each patch's sub-tokens.
        is_flat_Bhw: bool ``(images, rows, columns)``, patches of one colour.
        most: as many experts as there can be: those of a layer, or heads times top-k.
    """

    checkpoint: Path
    sha256: str
    updates: int
    layers: list[int]
    counts_BLhw: Tensor
    is_flat_Bhw: Tensor
    most: int

    def mean(self, layer: int | None = None, flat: bool | None = None) -> float | None:
        """Mean over patches.

        Args:
            layer: of this place among ``layers``; None for all of them.
            flat: of patches of one colour, or of the others; None for all. None if there is no such patch.
        """
        counts_BLhw = self.counts_BLhw if layer is None else self.counts_BLhw[:, layer : layer + 1]
        counts_Bhw = counts_BLhw.double().mean(1)
        if flat is not None:
            counts_Bhw = counts_Bhw[self.is_flat_Bhw == flat]
        return float(counts_Bhw.mean()) if counts_Bhw.numel() else None

    def record(self) -> dict[str, Any]:
        """The figures as JSON."""
        return {
            "checkpoint": self.checkpoint.name,
            "checkpoint_sha256": self.sha256,
            "updates": self.updates,
            "layers": self.layers,
            "most": self.most,
            "mean": self.mean(),
            "mean_flat": self.mean(flat=True),
            "mean_drawn": self.mean(flat=False),
            "mean_by_layer": [self.mean(place) for place in range(len(self.layers))],
            "counts": self.counts_BLhw.tolist(),
        }


@torch.no_grad()
def measure_diversity(checkpoint: Path, data: Path, paths: Sequence[Path]) -> PatchDiversity:
    """Route images and count.

    Args:
        checkpoint: of a model of images and text with experts.
        data: its prepared folder.

    Raises:
        ValueError, OSError: for a dense model or another kind of checkpoint, or an image that cannot be read.
    """
    updates = num_updates(checkpoint)
    model, task = load_moe_model(checkpoint, data, _BATCH)
    if not hasattr(model, "beit3"):
        raise UserError(f"{checkpoint} is a language model: it has no image patches")
    images = prepare_images(paths, task.args.img_size)
    layers, config = expert_layers(model), None
    device = next(model.parameters()).device
    counts = []
    for start in range(0, len(images), _BATCH):
        with recorded_choices(model) as calls:
            model(images=images[start : start + _BATCH].to(device))
        found = []
        for layer in layers:
            config = model.beit3.encoder.layers[layer].moe_layer.config
            patches = calls[0].choices[layer][:, 1:]
            found.append(distinct_experts(patches, config.num_experts).view(-1, *task.grid))
        counts.append(torch.stack(found, dim=1).cpu())
    assert config is not None
    return PatchDiversity(
        checkpoint=checkpoint,
        sha256=sha256_of(checkpoint),
        updates=updates,
        layers=layers,
        counts_BLhw=torch.cat(counts),
        is_flat_Bhw=flat_patches(images, task.args.patch_size),
        most=min(config.num_experts, config.split_heads * config.top_k),
    )


def prepare_images(paths: Sequence[Path], size: int) -> Tensor:
    """``(B, 3, size, size)`` as evaluation sees them."""
    transform = EvaluationTransform(size)
    return torch.stack([transform(read_image(path)) for path in paths])


def shown(image: Tensor) -> Image.Image:
    """An image as the model sees it: ``(3, H, W)`` of -1 to 1."""
    pixels = ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def flat_patches(images: Tensor, patch_size: int) -> Tensor:
    """``(B, 3, H, W) -> bool (B, rows, columns)``: patches that show one colour."""
    patches = images.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size).flatten(4)
    return (patches.amax(-1) - patches.amin(-1)).amax(1) < _FLAT


def num_updates(checkpoint: Path) -> int:
    """How many updates a checkpoint was trained for; 0 if it does not say."""
    history = read_checkpoint(checkpoint).get("optimizer_history") or [{}]
    return int(history[-1].get("num_updates", 0))
