"""From images to the tensors that models and visual tokenizers read.

A transform is called with an image and a generator and draws everything random from that generator; torchvision does
the work on pixels. Settings are BEiT-3's, and for pre-training BEiT v2's.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from .randaugment import randaugment

_ASPECT = (3 / 4, 4 / 3)
_TRIES = 10


class Normalisation(NamedTuple):
    """Mean and standard deviation of each channel, of values in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


INCEPTION = Normalisation((0.5,) * 3, (0.5,) * 3)
IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def draw_crop(width: int, height: int, min_scale: float, rng: np.random.Generator) -> Box:
    """A random part with ``min_scale`` to all of the area and an aspect of 3/4 to 4/3.

    Where ten draws do not fit into the image, which is then a narrow one, it is the largest central part of an
    allowed aspect.
    """
    for _ in range(_TRIES):
        area = width * height * rng.uniform(min_scale, 1)
        aspect = math.exp(rng.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = int(rng.integers(height - crop_height + 1)), int(rng.integers(width - crop_width + 1))
            return Box(top, left, crop_height, crop_width)
    crop_width = min(width, round(height * _ASPECT[1]))
    crop_height = min(height, round(width / _ASPECT[0]))
    return Box((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)


def jitter_colours(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation times ``1 - strength`` to ``1 + strength`` each, in random order."""
    adjustments = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
    for place in rng.permutation(len(adjustments)):
        image = adjustments[place](image, rng.uniform(1 - strength, 1 + strength))
    return image


def resize(image: Image.Image, size: int, box: Box | None = None) -> Image.Image:
    """A part of an image, or all of it, as a square of ``size`` pixels; bicubic."""
    top, left, height, width = box or Box(0, 0, image.height, image.width)
    return F.resized_crop(image, top, left, height, width, [size, size], InterpolationMode.BICUBIC)


def normalise(pixels: Tensor, by: Normalisation = INCEPTION) -> Tensor:
    """``(3, H, W)`` of values in [0, 1], less the mean and divided by the standard deviation of each channel."""
    return F.normalize(pixels, by.mean, by.std)


class PretrainingViews:
    """Two views of one crop: one for the model, one for the visual tokenizer, whose codes are what it predicts.

    Args:
        size: side of the model's view.
        tokenizer_size: side of the visual tokenizer's.
        min_scale: smallest crop, in areas of the image (BEiT v2: 0.2).
        jitter: strength of the change of colours (BEiT v2: 0.4); 0 for none.
        flip: whether half of the images are mirrored.
    """

    def __init__(
        self, size: int, tokenizer_size: int, *, min_scale: float = 0.2, jitter: float = 0.4, flip: bool = True
    ) -> None:
        self.size, self.tokenizer_size = size, tokenizer_size
        self._min_scale, self._jitter, self._flip = min_scale, jitter, flip

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """``(3, size, size)`` normalised, and ``(3, tokenizer_size, tokenizer_size)`` in [0, 1]."""
        if self._jitter:
            image = jitter_colours(image, self._jitter, rng)
        if self._flip and rng.random() < 0.5:
            image = F.hflip(image)
        box = draw_crop(*image.size, self._min_scale, rng)
        return _two_views(image, self.size, self.tokenizer_size, box)


class EvaluationViews:
    """The two views of the whole image, without any change: for validation."""

    def __init__(self, size: int, tokenizer_size: int) -> None:
        self.size, self.tokenizer_size = size, tokenizer_size

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> tuple[Tensor, Tensor]:
        """``(3, size, size)`` normalised, and ``(3, tokenizer_size, tokenizer_size)`` in [0, 1]; no draw is made."""
        return _two_views(image, self.size, self.tokenizer_size, None)


def _two_views(image: Image.Image, size: int, tokenizer_size: int, box: Box | None) -> tuple[Tensor, Tensor]:
    view = F.to_tensor(resize(image, size, box))
    tokenizer_view = view if size == tokenizer_size else F.to_tensor(resize(image, tokenizer_size, box))
    return normalise(view), tokenizer_view


class TrainTransform:
    """BEiT-3's transform for fine-tuning: a crop of at least half of the area, mirrored in half of the cases.

    Args:
        size: side of the view.
        randaug: whether RandAugment (2 operations, magnitude 7 of 10) comes on top.
        min_scale: smallest crop, in areas of the image.
        flip: whether half of the images are mirrored, also where a text speaks of left and right, as BEiT-3 does.
        by: the normalisation.
    """

    def __init__(
        self,
        size: int,
        randaug: bool = False,
        *,
        min_scale: float = 0.5,
        flip: bool = True,
        by: Normalisation = INCEPTION,
    ) -> None:
        self.size = size
        self._randaug, self._min_scale, self._flip, self._by = randaug, min_scale, flip, by

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        """``(3, size, size)``."""
        image = resize(image, self.size, draw_crop(*image.size, self._min_scale, rng))
        if self._flip and rng.random() < 0.5:
            image = F.hflip(image)
        if self._randaug:
            image = randaugment(image, rng)
        return normalise(F.to_tensor(image), self._by)


class EvaluationTransform:
    """The whole image as a square, without a crop, as BEiT-3 evaluates.

    Args:
        size: side of the view.
        crop_fraction: None, or the part of the sides that the central square keeps, which ImageNet is evaluated on
            (timm: 0.875 and more) after its shorter side is made ``size / crop_fraction``.
        by: the normalisation.
    """

    def __init__(self, size: int, crop_fraction: float | None = None, *, by: Normalisation = INCEPTION) -> None:
        self.size = size
        self._crop_fraction, self._by = crop_fraction, by

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> Tensor:
        """``(3, size, size)``; no draw is made."""
        box = None
        if self._crop_fraction is not None:
            side = max(1, round(min(image.size) * self._crop_fraction))
            box = Box((image.height - side) // 2, (image.width - side) // 2, side, side)
        return normalise(F.to_tensor(resize(image, self.size, box)), self._by)
