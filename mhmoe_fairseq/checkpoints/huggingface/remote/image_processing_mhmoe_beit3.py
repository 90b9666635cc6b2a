"""Images as MH-MoE BEiT-3 is evaluated on them: squares, resized by Pillow; for transformers 5.10 and later."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor, BatchFeature

_BICUBIC = Image.Resampling.BICUBIC


def as_rgb(image: Image.Image) -> Image.Image:
    """8 bits of red, green and blue: grey of 16 bits is scaled, what is transparent becomes white."""
    if image.mode.startswith("I"):
        image = Image.fromarray(np.rint(np.asarray(image).astype(np.float64) * (255 / 65535)).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


class MHMoEImageProcessor(BaseImageProcessor):
    """Makes ``pixel_values``, ``(B, 3, size, size)``, of images.

    Args:
        size: side in pixels.
        crop_fraction: None for the whole image, or the part of the shorter side that a central square keeps.
        image_mean, image_std: of each channel, of values from 0 to 1.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self, size: int = 224, crop_fraction: float | None = None, image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5), **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(**kwargs)
        self.size, self.crop_fraction = size, crop_fraction
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        """As ``preprocess``."""
        return self.preprocess(images, **kwargs)

    def preprocess(self, images: Any, return_tensors: Any = None, **kwargs: Any) -> BatchFeature:
        """``pixel_values`` of one image or of several: Pillow's, or arrays ``(height, width[, channels])`` of bytes."""
        given = images if isinstance(images, (list, tuple)) else [images]
        return BatchFeature({"pixel_values": torch.stack([self._view(image) for image in given])})

    def _view(self, image: Any) -> torch.Tensor:
        image = as_rgb(image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image)))
        if self.crop_fraction is not None:
            side = max(1, round(min(image.size) * self.crop_fraction))
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
        pixels = torch.from_numpy(np.array(image.resize((self.size, self.size), _BICUBIC))).permute(2, 0, 1)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.image_mean, self.image_std))
        return (pixels.float() / 255 - mean) / std
