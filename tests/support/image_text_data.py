"""Two dozen small images of coloured shapes, prepared by the real pipeline: every file that it writes.

>>> folder = prepare_shapes(tmp_path / "data")  # well under a second; 32 x 32 pixels, patches of 8, 16 codes
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Sequence

from PIL import Image, ImageDraw

from mhmoe_fairseq.prepare.image_text.derived import DerivedSettings
from mhmoe_fairseq.prepare.image_text.images import OpenedImages, Sentence, SourceImage
from mhmoe_fairseq.prepare.image_text.pipeline import ImageTextPreparation, ImageTextSettings
from mhmoe_fairseq.prepare.visual_tokenizers.settings import KMeansSettings

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 70, 210), "yellow": (240, 210, 50)}
SHAPES = ("circle", "square", "bar")
SIZES = {"small": 6, "large": 13}
GERMAN = {
    "red": "roter", "green": "gruener", "blue": "blauer", "yellow": "gelber", "circle": "Kreis", "square": "Klotz",
    "bar": "Balken", "small": "kleiner", "large": "grosser",
}  # fmt: skip
IMG_SIZE, PATCH_SIZE, CODES = 32, 8, 16


@dataclass(frozen=True)
class Shapes:
    """A source of images: every shape in every colour and size, captioned ``large red circle``.

    Args:
        spoiled: names of images whose files are cut off in the middle.
    """

    spoiled: tuple[str, ...] = ()
    name: str = "shapes"
    licence: str = "none needed"

    def identity(self, languages: Sequence[str]) -> dict[str, object]:
        return {"spoiled": list(self.spoiled)}

    def open(self, languages: Sequence[str], folder: Path, cache_dir: Path, say: Callable[[str], None]) -> OpenedImages:
        images = [
            self._image(folder, size, colour, shape, languages)
            for shape in SHAPES
            for colour in COLOURS
            for size in SIZES
        ]
        sentences = [
            Sentence(f"{first}-{second}-{shape}", self._sentence(language, first, second, shape))
            for language in languages
            for first in COLOURS
            for second in COLOURS
            for shape in SHAPES
        ]
        return OpenedImages({"version": "1"}, images, sentences)

    def _image(self, folder: Path, size: str, colour: str, shape: str, languages: Sequence[str]) -> SourceImage:
        unit = f"{size}-{colour}-{shape}"
        path = folder / "images" / f"{unit}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_shape(SIZES[size], COLOURS[colour], shape).save(path)
        if unit in self.spoiled:
            path.write_bytes(path.read_bytes()[:40])
        captions = {language: [self._translate(language, size, colour, shape)] for language in languages}
        keywords = (size, colour, "round" if shape == "circle" else "straight")
        return SourceImage(
            f"images/{unit}.png", captions, unit, family=shape, group=shape, subgroup=f"{size} {shape}",
            keywords=keywords, facts={"colour": colour},
        )  # fmt: skip

    def _sentence(self, language: str, first: str, second: str, shape: str) -> str:
        words = self._translate(language, first, shape), self._translate(language, second, shape)
        return f"{words[0]}, {words[1]}."

    def _translate(self, language: str, *words: str) -> str:
        return " ".join(GERMAN[word] if language == "de" else word for word in words)


def draw_shape(radius: int, colour: tuple[int, int, int], shape: str) -> Image.Image:
    """A shape in the middle of a white image; transparent around it."""
    image = Image.new("RGBA", (IMG_SIZE, IMG_SIZE), (0, 0, 0, 0))
    middle, brush = IMG_SIZE // 2, ImageDraw.Draw(image)
    width = radius // 3 if shape == "bar" else radius
    box = [middle - width, middle - radius, middle + width, middle + radius]
    (brush.ellipse if shape == "circle" else brush.rectangle)(box, fill=(*colour, 255))
    return image


def shape_settings(**changes: object) -> ImageTextSettings:
    """Settings that suit two dozen images."""
    settings = {
        "vocab_size": 300, "valid_fraction": 0.25, "test_fraction": 0.25, "derived": DerivedSettings(1, 60),
        "tokenizer": KMeansSettings(CODES, PATCH_SIZE, IMG_SIZE, max_patches=2000, iterations=4),
    }  # fmt: skip
    return ImageTextSettings(**{**settings, **changes})


def shapes_preparation(source: Shapes, say: Callable[[str], None] = str, **changes: object) -> ImageTextPreparation:
    """A preparation with :func:`shape_settings`."""
    return ImageTextPreparation(source, shape_settings(**changes), Path(), say)


def prepare_shapes(dest: Path, source: Shapes | None = None, **changes: object) -> Path:
    """Prepares the shapes with :func:`shape_settings`; the folder."""
    shapes_preparation(source or Shapes(), **changes).run(dest)
    return dest
