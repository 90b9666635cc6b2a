"""RandAugment as BEiT-3's fine-tuning recipes use it: two of ten operations, at magnitude 7 of 10."""

import math
from typing import Callable

import numpy as np
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

_GREY = [128.0, 128.0, 128.0]  # what shifted and turned images leave free
_MOST_TURN, _MOST_SHEAR, _MOST_SHIFT = 30.0, 0.3, 10 / 224  # degrees, tangent, share of the side
_PROBABILITY = 0.5


def _affine(image: Image.Image, *, angle: float = 0.0, shift: tuple[float, float] = (0, 0), shear=(0.0, 0.0)):
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


def randaugment(
    image: Image.Image, rng: np.random.Generator, num_operations: int = 2, magnitude: float = 7.0
) -> Image.Image:
    """``num_operations`` random operations, each done with probability 1/2, directions to either side.

    Args:
        magnitude: of 10.
    """
    names = list(OPERATIONS)
    for place in rng.integers(len(names), size=num_operations):
        is_done, sign = rng.random() < _PROBABILITY, 1 if rng.random() < 0.5 else -1
        if is_done:
            image = OPERATIONS[names[place]](image, magnitude / 10, sign)
    return image
