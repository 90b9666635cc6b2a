"""What a source of images gives: images with captions and metadata, and sentences without an image."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Protocol, Sequence

from ...common.files import atomic_open
from ..archives import Say

IMAGES = "images"
CATALOGUE, SENTENCES = "images.jsonl", "sentences.jsonl"


@dataclass(frozen=True)
class SourceImage:
    """One image and what its source says about it.

    Args:
        path: relative to the prepared folder, ``images/...``; it names the image everywhere.
        captions: language -> captions; cleaned lines.
        unit: images of one unit, such as one drawing in several skin tones, go to the same part.
        family: units of one family differ in something that captions name; empty where nothing is known. Only of a
            family that training has seen too, a held-out image's caption can be put together.
        group: coarse kind; empty if unknown.
        subgroup: finer kind; empty if unknown.
        keywords: English words that fit.
        facts: what the metadata tell beyond that, such as ``{"colour": "red"}``.
    """

    path: str
    captions: dict[str, list[str]]
    unit: str
    family: str = ""
    group: str = ""
    subgroup: str = ""
    keywords: tuple[str, ...] = ()
    facts: dict[str, str] = field(default_factory=dict)


class Sentence(NamedTuple):
    """A line of text; it follows the images of its unit into their part."""

    unit: str
    language: str
    text: str


class OpenedImages(NamedTuple):
    """What a source gave: provenance for the manifest, images (already written), and sentences."""

    provenance: dict[str, Any]
    images: list[SourceImage]
    sentences: list[Sentence]


class ImageSource(Protocol):
    """Images by name of their source.

    ``identity`` is what makes two preparations differ, without fetching anything. ``open`` writes the images under
    ``folder / "images"``.
    """

    @property
    def name(self) -> str: ...

    @property
    def licence(self) -> str: ...

    def identity(self, languages: Sequence[str]) -> dict[str, object]: ...

    def open(self, languages: Sequence[str], folder: Path, cache_dir: Path, say: Say) -> OpenedImages: ...


def caption_sentences(images: Iterable[SourceImage]) -> Iterator[Sentence]:
    """Every caption once as a line of text, for sources that have no other text."""
    for image in images:
        for language, captions in image.captions.items():
            for caption in captions:
                yield Sentence(image.unit, language, caption)


def write_catalogue(folder: Path, opened: OpenedImages) -> None:
    """Writes images and sentences, one JSON object per line, each file atomically."""
    _write_lines(folder / SENTENCES, [sentence._asdict() for sentence in opened.sentences])
    _write_lines(folder / CATALOGUE, [asdict(image) for image in opened.images])


def read_catalogue(folder: Path) -> tuple[list[SourceImage], list[Sentence]]:
    """What :func:`write_catalogue` wrote, in the same order."""
    images = _read_lines(folder / CATALOGUE, lambda row: SourceImage(**{**row, "keywords": tuple(row["keywords"])}))
    return images, _read_lines(folder / SENTENCES, lambda row: Sentence(**row))


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with atomic_open(path) as stream:
        for row in rows:
            stream.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def _read_lines(path: Path, make: Callable[[dict[str, Any]], Any]) -> list[Any]:
    with open(path, encoding="utf-8") as stream:
        return [make(json.loads(line)) for line in stream]
