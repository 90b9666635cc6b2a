"""Units that show the same picture become one, whatever their source calls them: Norway's flag is Svalbard's too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Sequence

from ...common.files import sha256_of
from .pictures import OpenedPictures, Picture


def join_equal_pictures(folder: Path, opened: OpenedPictures) -> tuple[OpenedPictures, int]:
    """Pictures and sentences with units joined, so that no file's content can go to two parts.

    Args:
        folder: what the pictures' paths are relative to.

    Returns:
        what was opened, and how many units went into another one.
    """
    joined = _representatives(folder, opened.pictures)
    pictures = [replace(picture, unit=joined[picture.unit]) for picture in opened.pictures]
    sentences = [sentence._replace(unit=joined.get(sentence.unit, sentence.unit)) for sentence in opened.sentences]
    gone = sum(unit != representative for unit, representative in joined.items())
    return opened._replace(pictures=pictures, sentences=sentences), gone


def _representatives(folder: Path, pictures: Sequence[Picture]) -> dict[str, str]:
    """Unit -> the first by name of all units that equal pictures connect, directly or over others."""
    parent = {picture.unit: picture.unit for picture in pictures}

    def root_of(unit: str) -> str:
        while parent[unit] != unit:
            parent[unit] = unit = parent[parent[unit]]
        return unit

    unit_of_content: dict[str, str] = {}
    for picture in pictures:
        first = unit_of_content.setdefault(sha256_of(folder / picture.path), picture.unit)
        one, other = sorted((root_of(first), root_of(picture.unit)))
        parent[other] = one
    return {unit: root_of(unit) for unit in parent}
