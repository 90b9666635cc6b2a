"""Reading one image as 8-bit RGB, or saying clearly what is wrong with its file."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from ...common.errors import UserError

MAX_PIXELS = 64_000_000
MIN_SIDE = 2
# Not all that Pillow knows: it hands EPS files, which are programs, to an interpreter.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
_WHITE = (255, 255, 255, 255)
_LARGEST_16_BIT = 65535
_TOO_LARGE = f"more than {MAX_PIXELS // 10**6} megapixels, the most that is decoded"
# By Pillow's name for how the samples lie in a PNG: 2 and 4 bits are spread over 8, of 16 the upper 8 are kept.
_SCALES: dict[str, Callable[[Any], Any]] = {
    "L;2": lambda grey: grey * 85,
    "L;4": lambda grey: grey * 17,
    "RGB;16B": lambda colour: tuple(value >> 8 for value in colour),
}

# fairseq sets the level of all loggers to DEBUG when it is imported from Python, and Pillow tells of every part of a
# file at that level.
if not logging.getLogger("PIL").level:
    logging.getLogger("PIL").setLevel(logging.INFO)


class ImageError(UserError):
    """A file that cannot be used as an image: the message names it and the rule that it breaks."""


def read_image(path: Path) -> Image.Image:
    """Decode an image as mode ``RGB``; see ``FORMATS``.

    Transparent parts become white, those of a PNG's one transparent colour too (of 16 bits per colour the upper bytes
    count, which is all that Pillow keeps of a pixel); CMYK is converted, 16-bit grey is scaled to 8 bits, of an
    animation the first frame is taken. The orientation tag of cameras is not applied: BEiT-3's readers do not either.
    Sizes are checked before anything is decoded.

    Raises:
        ImageError: no such file, not an image, truncated or damaged, a side under 2 pixels, more than 64 megapixels,
            or values that no rule brings to 8 bits.
        OSError: the file is there and cannot be read.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if min(width, height) < MIN_SIDE:
                raise ImageError(f"{path}: {width} x {height} pixels, each side must have at least {MIN_SIDE}")
            if width * height > MAX_PIXELS:
                raise ImageError(f"{path}: {width} x {height} pixels, {_TOO_LARGE}")
            scale = _scale_of_samples(image)
            image.load()
            if "transparency" in image.info and scale is not None:
                image.info["transparency"] = scale(image.info["transparency"])
            return _to_rgb(path, image)
    except (ImageError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such image") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{path}: not an image of a known format ({', '.join(FORMATS)})") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{path}: {_TOO_LARGE}") from error
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        if isinstance(error, OSError) and error.errno is not None:  # no right to read it, a broken disk, ...
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{path}: truncated or damaged image ({reason})") from error


def _scale_of_samples(image: ImageFile.ImageFile) -> Callable[[Any], Any] | None:
    """Return what makes of a PNG's transparent colour, as the file has it, the value that Pillow gives such pixels."""
    layout = image.tile[0][3] if image.format == "PNG" and image.tile else None
    return _SCALES.get(layout) if isinstance(layout, str) else None


def _to_rgb(path: Path, image: Image.Image) -> Image.Image:
    if image.mode in ("F", "LAB"):
        raise ImageError(f"{path}: colours of mode {image.mode}, must have 8 or 16 bits of grey, RGB or CMYK")
    if image.mode.startswith("I"):
        return _from_16_bit(path, image).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image).convert("RGB")
    return image.convert("RGB")


def _from_16_bit(path: Path, image: Image.Image) -> Image.Image:
    """Grey of 16 bits as 8 bits: Pillow's own conversion would cut everything above 255 off."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > _LARGEST_16_BIT:
        raise ImageError(
            f"{path}: grey values from {values.min()} to {values.max()}, must have 8 or 16 bits per channel"
        )
    grey = np.rint(values * (255 / _LARGEST_16_BIT)).astype(np.uint8)
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = _WHITE[0]
    return Image.fromarray(grey)
