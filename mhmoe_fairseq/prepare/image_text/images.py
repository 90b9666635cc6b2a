"""What a source of images gives: images with captions and metadata, and sentences without an image."""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Iterable, Iterator, NamedTuple, Protocol, Sequence

from ...common.files import atomic_open, json_line, read_json_lines
from ..archives import Say

IMAGES = "images"
CATALOGUE, SENTENCES = "images.jsonl", "sentences.jsonl"
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white", "grey", "pink")
_COLOUR = re.compile(rf"\b({'|'.join(COLOURS)})\b")


@dataclass(frozen=True)
class SourceImage:
    """One image and what its source says about it.

    Args:
        path: relative to the prepared folder, ``images/...``; it names the image everywhere.
        captions: language -> captions; cleaned lines.
        unit: images of one unit, such as one drawing in several skin tones, go to the same part.
        family: units of one family differ in something that captions name; empty where nothing is known. Only for a
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

    name: str
    licence: str

    def identity(self, languages: Sequence[str]) -> dict[str, object]: ...

    def open(self, languages: Sequence[str], folder: Path, cache_dir: Path, say: Say) -> OpenedImages: ...


def colour_facts(text: str) -> dict[str, str]:
    """Returns ``{"colour": name}`` where an English text names exactly one colour, otherwise nothing."""
    found = set(_COLOUR.findall(text.lower()))
    return {"colour": found.pop()} if len(found) == 1 else {}


def kinds_by_folder(name: str) -> dict[str, str]:
    """Returns an image's first two folders as its ``group`` and ``subgroup``."""
    return dict(zip(("group", "subgroup"), (*PurePosixPath(name).parts[:-1], "", "")))


def caption_sentences(images: Iterable[SourceImage]) -> Iterator[Sentence]:
    """Yields every caption as a line of text, for sources that have no other text."""
    for image in images:
        for language, captions in image.captions.items():
            yield from (Sentence(image.unit, language, caption) for caption in captions)


def write_catalogue(folder: Path, opened: OpenedImages) -> None:
    """Writes images and sentences, one JSON object per line, each file atomically."""
    for name, rows in ((SENTENCES, map(Sentence._asdict, opened.sentences)), (CATALOGUE, map(asdict, opened.images))):
        with atomic_open(folder / name) as stream:
            stream.writelines(map(json_line, rows))


def read_catalogue(folder: Path) -> tuple[list[SourceImage], list[Sentence]]:
    """Returns what :func:`write_catalogue` wrote, in the same order."""
    rows = [row for _, row in read_json_lines(folder / CATALOGUE)]
    images = [SourceImage(**{**row, "keywords": tuple(row["keywords"])}) for row in rows]
    return images, [Sentence(**row) for _, row in read_json_lines(folder / SENTENCES)]
