"""From images to the tensors that models and visual tokenizers read.

A transform is called with an image and a generator and draws everything random from that generator; torchvision does
the work on pixels. Settings are BEiT-3's, and for pre-training BEiT v2's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

_ASPECT = (3 / 4, 4 / 3)
_TRIES = 10
_GREY = [128.0, 128.0, 128.0]  # what shifted and turned images leave free
_MOST_TURN, _MOST_SHEAR, _MOST_SHIFT = 30.0, 0.3, 10 / 224  # degrees, tangent, share of the side
_RANDAUG_OPERATIONS, _RANDAUG_LEVEL, _RANDAUG_PROBABILITY = 2, 7 / 10, 0.5


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
    """Draw a part with ``min_scale`` to all of the area and an aspect of 3/4 to 4/3.

    Where ten draws do not fit into the image, which is then narrow, it is the largest central part of such an aspect.
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
    """Change brightness, contrast and saturation by ``1 - strength`` to ``1 + strength`` each, in random order."""
    adjustments = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
    for index in rng.permutation(len(adjustments)):
        image = adjustments[index](image, rng.uniform(1 - strength, 1 + strength))
    return image


def resize(image: Image.Image, size: int, box: Box | None = None) -> Image.Image:
    """Return a part of an image, or all of it, as a square of ``size`` pixels; bicubic."""
    top, left, height, width = box or Box(0, 0, image.height, image.width)
    return F.resized_crop(image, top, left, height, width, [size, size], InterpolationMode.BICUBIC)


def _affine(
    image: Image.Image, *, angle: float = 0.0, shift: tuple[float, float] = (0, 0), shear: tuple[float, float] = (0, 0)
) -> Image.Image:
    pixels = [round(part * side) for part, side in zip(shift, image.size)]
    degrees = [math.degrees(math.atan(part)) for part in shear]
    return F.affine(image, angle, pixels, 1.0, degrees, InterpolationMode.BILINEAR, _GREY)


# Each is called with the image, the magnitude in [0, 1] and a sign, which only directions have.
Operation = Callable[[Image.Image, float, int], Image.Image]
OPERATIONS: dict[str, Operation] = {
    "identity": lambda image, level, sign: image,
    "autocontrast": lambda image, level, sign: F.autocontrast(image),
    "equalize": lambda image, level, sign: F.equalize(image),
    "brightness": lambda image, level, sign: F.adjust_brightness(image, 0.1 + 1.8 * level),
    "sharpness": lambda image, level, sign: F.adjust_sharpness(image, 0.1 + 1.8 * level),
    "shear_x": lambda image, level, sign: _affine(image, shear=(sign * level * _MOST_SHEAR, 0.0)),
    "shear_y": lambda image, level, sign: _affine(image, shear=(0.0, sign * level * _MOST_SHEAR)),
    "translate_x": lambda image, level, sign: _affine(image, shift=(sign * level * _MOST_SHIFT, 0)),
    "translate_y": lambda image, level, sign: _affine(image, shift=(0, sign * level * _MOST_SHIFT)),
    "rotate": lambda image, level, sign: _affine(image, angle=sign * level * _MOST_TURN),
}


def randaugment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Do two of ten operations at magnitude 7 of 10, each with probability 1/2 and directions to either side."""
    names = list(OPERATIONS)
    for index in rng.integers(len(names), size=_RANDAUG_OPERATIONS):
        is_done, sign = rng.random() < _RANDAUG_PROBABILITY, 1 if rng.random() < 0.5 else -1
        if is_done:
            image = OPERATIONS[names[index]](image, _RANDAUG_LEVEL, sign)
    return image


@dataclass(frozen=True)
class _Views:
    size: int
    tokenizer_size: int

    def _of(self, image: Image.Image, box: Box | None = None) -> tuple[Tensor, Tensor]:
        view = F.to_tensor(resize(image, self.size, box))
        is_one = self.size == self.tokenizer_size
        tokenizer_view = view if is_one else F.to_tensor(resize(image, self.tokenizer_size, box))
        return F.normalize(view, *INCEPTION), tokenizer_view


@dataclass(frozen=True)
class EvaluationViews(_Views):
    """Two views of an image: for the model, and for the visual tokenizer, whose codes are what the model predicts.

    Args:
        size, tokenizer_size: sides of the two views, in pixels.
    """

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return ``(3, size, size)`` normalised, and ``(3, tokenizer_size, tokenizer_size)`` in [0, 1]."""
        return self._of(image)


@dataclass(frozen=True)
class PretrainingViews(_Views):
    """Two views of one random crop of the image with other colours.

    Args:
        min_scale: smallest crop, in areas of the image (BEiT v2: 0.2).
        jitter: strength of the change of colours (BEiT v2: 0.4); 0 for none.
        flip: whether half of the images are mirrored.
    """

    min_scale: float = 0.2
    jitter: float = 0.4
    flip: bool = True

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Return the views, see :class:`EvaluationViews`."""
        if self.jitter:
            image = jitter_colours(image, self.jitter, rng)
        if self.flip and rng.random() < 0.5:
            image = F.hflip(image)
        return self._of(image, draw_crop(*image.size, self.min_scale, rng))


@dataclass(frozen=True)
class TrainTransform:
    """BEiT-3's transform for fine-tuning: a crop of at least half of the area, mirrored in half of the cases.

    Args:
        size: side of the view, in pixels.
        randaug: whether RandAugment comes on top.
        min_scale: smallest crop, in areas of the image.
        flip: whether half of the images are mirrored, also where a text speaks of left and right, as BEiT-3 does.
        by: the normalisation.
    """

    size: int
    randaug: bool = False
    min_scale: float = 0.5
    flip: bool = True
    by: Normalisation = INCEPTION

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        """Return ``(3, size, size)``."""
        image = resize(image, self.size, draw_crop(*image.size, self.min_scale, rng))
        if self.flip and rng.random() < 0.5:
            image = F.hflip(image)
        if self.randaug:
            image = randaugment(image, rng)
        return F.normalize(F.to_tensor(image), *self.by)


@dataclass(frozen=True)
class EvaluationTransform:
    """The whole image as a square, without a crop, as BEiT-3 evaluates.

    Args:
        size: side of the view, in pixels.
        crop_fraction: None, or the part of the sides that the central square keeps, which ImageNet is evaluated on
            (timm: 0.875 and more) after its shorter side is made ``size / crop_fraction``.
        by: the normalisation.
    """

    size: int
    crop_fraction: float | None = None
    by: Normalisation = INCEPTION

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> Tensor:
        """Return ``(3, size, size)``; no draw is made."""
        box = None
        if self.crop_fraction is not None:
            side = max(1, round(min(image.size) * self.crop_fraction))
            box = Box((image.height - side) // 2, (image.width - side) // 2, side, side)
        return F.normalize(F.to_tensor(resize(image, self.size, box)), *self.by)
