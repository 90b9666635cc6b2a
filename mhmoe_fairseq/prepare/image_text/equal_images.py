"""Units that show the same image become one, whatever their source calls them: Norway's flag is Svalbard's too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Sequence

from ...common.files import sha256_of
from .images import OpenedImages, SourceImage


def join_equal_images(folder: Path, opened: OpenedImages) -> tuple[OpenedImages, int]:
    """Images and sentences with units joined, so that no file's content can go to two parts.

    Args:
        folder: what the images' paths are relative to.

    Returns:
        what was opened, and how many units went into another one.
    """
    joined = _representatives(folder, opened.images)
    images = [replace(image, unit=joined[image.unit]) for image in opened.images]
    sentences = [sentence._replace(unit=joined.get(sentence.unit, sentence.unit)) for sentence in opened.sentences]
    gone = sum(unit != representative for unit, representative in joined.items())
    return opened._replace(images=images, sentences=sentences), gone


def _representatives(folder: Path, images: Sequence[SourceImage]) -> dict[str, str]:
    """Unit -> the first by name of all units that equal images connect, directly or over others."""
    parent = {image.unit: image.unit for image in images}

    def root_of(unit: str) -> str:
        while parent[unit] != unit:
            parent[unit] = unit = parent[parent[unit]]
        return unit

    unit_of_content: dict[str, str] = {}
    for image in images:
        first = unit_of_content.setdefault(sha256_of(folder / image.path), image.unit)
        one, other = sorted((root_of(first), root_of(image.unit)))
        parent[other] = one
    return {unit: root_of(unit) for unit in parent}
