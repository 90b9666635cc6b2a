"""Small folders of images, and the settings of data sets that read them."""

from pathlib import Path
from typing import Any

import numpy as np
from fairseq.data import Dictionary
from PIL import Image

from mhmoe_fairseq.data.datasets.base import DatasetSettings

NUM_WORDS = 60


def make_dictionary() -> Dictionary:
    dictionary = Dictionary()
    for number in range(NUM_WORDS):
        dictionary.add_symbol(f"w{number}")
    dictionary.add_symbol("<mask>")
    return dictionary


def settings(folder: Path, **changes: Any) -> DatasetSettings:
    """32-pixel images of 8-pixel patches and texts of at most 10 tokens."""
    values = {"img_size": 32, "patch_size": 8, "max_text_length": 10, "seed": 1, "training": True, **changes}
    return DatasetSettings(folder, make_dictionary(), **values)


def write_images(folder: Path, count: int) -> list[str]:
    """``images/0.png``, ... of noise, each of another size; their paths in an index."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (30 + number, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        paths.append(f"images/{number}.png")
    return paths


def words(number: int, length: int) -> list[int]:
    """Ids of a text that its number tells from others."""
    return [4 + (7 * number + place) % NUM_WORDS for place in range(length)]
