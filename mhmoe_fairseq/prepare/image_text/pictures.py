"""What a source of pictures gives: pictures with captions and metadata, and sentences without a picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Protocol, Sequence

from ...common.files import atomic_open
from ..archives import Say

IMAGES = "images"
CATALOGUE, SENTENCES = "pictures.jsonl", "sentences.jsonl"


@dataclass(frozen=True)
class Picture:
    """One picture and what its source says about it.

    Args:
        path: relative to the prepared folder, ``images/...``; it names the picture everywhere.
        captions: language -> captions; cleaned lines.
        unit: pictures of one unit, such as one drawing in several skin tones, go to the same part.
        family: units of one family differ in something that captions name; empty where nothing is known. Only of a
            family that training has seen too, a held-out picture's caption can be put together.
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
    """A line of text; it follows the pictures of its unit into their part."""

    unit: str
    language: str
    text: str


class OpenedPictures(NamedTuple):
    """What a source gave: provenance for the manifest, pictures (already written), and sentences."""

    provenance: dict[str, Any]
    pictures: list[Picture]
    sentences: list[Sentence]


class PictureSource(Protocol):
    """Pictures by name of their source.

    ``identity`` is what makes two preparations differ, without fetching anything. ``open`` writes the pictures under
    ``folder / "images"``.
    """

    @property
    def name(self) -> str: ...

    @property
    def licence(self) -> str: ...

    def identity(self, languages: Sequence[str]) -> dict[str, object]: ...

    def open(self, languages: Sequence[str], folder: Path, cache_dir: Path, say: Say) -> OpenedPictures: ...


def caption_sentences(pictures: Iterable[Picture]) -> Iterator[Sentence]:
    """Every caption once as a line of text, for sources that have no other text."""
    for picture in pictures:
        for language, captions in picture.captions.items():
            for caption in captions:
                yield Sentence(picture.unit, language, caption)


def write_catalogue(folder: Path, opened: OpenedPictures) -> None:
    """Writes pictures and sentences, one JSON object per line, each file atomically."""
    _write_lines(folder / SENTENCES, [sentence._asdict() for sentence in opened.sentences])
    _write_lines(folder / CATALOGUE, [asdict(picture) for picture in opened.pictures])


def read_catalogue(folder: Path) -> tuple[list[Picture], list[Sentence]]:
    """What :func:`write_catalogue` wrote, in the same order."""
    pictures = _read_lines(folder / CATALOGUE, lambda row: Picture(**{**row, "keywords": tuple(row["keywords"])}))
    return pictures, _read_lines(folder / SENTENCES, lambda row: Sentence(**row))


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with atomic_open(path) as stream:
        for row in rows:
            stream.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def _read_lines(path: Path, make: Callable[[dict[str, Any]], Any]) -> list[Any]:
    with open(path, encoding="utf-8") as stream:
        return [make(json.loads(line)) for line in stream]
