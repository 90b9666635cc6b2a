"""Images with captions and metadata, and sentences: what a source gives, what is kept, and which part it goes to.

No content is in two parts: images are divided by units, and units that show the same image are one.
"""

import hashlib
import random
import re
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Iterable, Mapping, NamedTuple, Optional, Protocol, Sequence

from tqdm import tqdm

from ...common.errors import UserError
from ...common.files import atomic_open, json_line, read_json_lines, sha256_of
from ...data.images.reading import ImageError, read_image
from ..archives import Say
from ..splits import SPLITS

IMAGES = "images"
CATALOGUE, SENTENCES = "images.jsonl", "sentences.jsonl"
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white", "grey", "pink")
_COLOUR = re.compile(rf"\b({'|'.join(COLOURS)})\b")


@dataclass(frozen=True)
class SourceImage:
    """One image and what its source says about it."""

    path: str  # relative to the prepared folder, ``images/...``; it names the image everywhere
    captions: dict[str, list[str]]  # by language; cleaned lines
    unit: str  # images of one unit, such as one drawing in several skin tones, go to the same part
    # Units of one family differ in something that captions name; empty where nothing is known. Only for a family that
    # training has seen too, a held-out image's caption can be put together.
    family: str = ""
    group: str = ""  # coarse kind; empty if unknown
    subgroup: str = ""  # finer kind; empty if unknown
    keywords: tuple[str, ...] = ()  # English words that fit
    facts: dict[str, str] = field(default_factory=dict)  # what else the metadata tell, such as ``{"colour": "red"}``


class Sentence(NamedTuple):
    """A line of text; it follows the images of its unit into their part."""

    unit: str
    text: str


class OpenedImages(NamedTuple):
    """What a source gave: provenance for the manifest, images (already written), and text without images."""

    provenance: dict[str, Any]
    images: list[SourceImage]
    sentences: Optional[list[Sentence]] = None  # None for the captions


class ImageSource(Protocol):
    """Images by name of their source: ``identity`` fetches nothing, ``open`` writes them into ``folder/images``."""

    name: str
    licence: str

    def identity(self, languages: Sequence[str]) -> dict[str, object]: ...

    def open(self, languages: Sequence[str], folder: Path, cache_dir: Path, say: Say) -> OpenedImages: ...


def colour_facts(text: str) -> dict[str, str]:
    """Returns ``{"colour": name}`` where an English text names exactly one colour, otherwise nothing."""
    found = set(_COLOUR.findall(text.lower()))
    return {"colour": found.pop()} if len(found) == 1 else {}


def file_image(
    folder: Path, name: PurePosixPath, content: bytes, captions: dict[str, list[str]], english: str,
    keywords: tuple[str, ...] = (),
) -> SourceImage:  # fmt: skip
    """Writes an image and returns it: its folders are its kinds, equal content is one unit, and colours are facts."""
    path = folder / IMAGES / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    group, subgroup, *_ = (*name.parts[:-1], "", "")
    unit = hashlib.sha256(content).hexdigest()[:16]
    return SourceImage(f"{IMAGES}/{name}", captions, unit, "", group, subgroup, keywords, colour_facts(english))


def caption_sentences(images: Iterable[SourceImage]) -> list[Sentence]:
    """Returns every caption as a line of text."""
    return [Sentence(image.unit, text) for image in images for texts in image.captions.values() for text in texts]


def keep_images(folder: Path, opened: OpenedImages) -> tuple[dict[str, Any], list[SourceImage], list[Sentence]]:
    """Leaves out unreadable images (``UserError`` if all are), joins units that show one, writes the catalogue."""
    kept, problems = _readable(folder, opened.images)
    joined = _joined_units(folder, kept)
    images = [replace(image, unit=joined[image.unit]) for image in kept]
    found = caption_sentences(opened.images) if opened.sentences is None else opened.sentences
    sentences = [Sentence(joined.get(unit, unit), text) for unit, text in found]
    for name, rows in ((SENTENCES, map(Sentence._asdict, sentences)), (CATALOGUE, map(asdict, images))):
        with atomic_open(folder / name) as stream:
            stream.writelines(map(json_line, rows))
    gone = sum(unit != root for unit, root in joined.items())
    return {"images": len(kept), "joined_things": gone, "unreadable": problems}, images, sentences


def read_catalogue(folder: Path) -> tuple[list[SourceImage], list[Sentence]]:
    """Returns the images and sentences that :func:`keep_images` left, in the same order."""
    rows = [row for _, row in read_json_lines(folder / CATALOGUE)]
    images = [SourceImage(**{**row, "keywords": tuple(row["keywords"])}) for row in rows]
    return images, [Sentence(row["unit"], row["text"]) for _, row in read_json_lines(folder / SENTENCES)]


def _readable(folder: Path, images: Sequence[SourceImage]) -> tuple[list[SourceImage], list[str]]:
    """Decodes every image once and deletes those that are no good; returns the others, and what was wrong."""
    kept, problems = [], []
    for image in tqdm(images, desc="read images", unit=" images", disable=None):
        try:
            read_image(folder / image.path)
        except ImageError as error:
            problems.append(str(error).replace(f"{folder}/", ""))
            (folder / image.path).unlink(missing_ok=True)
        else:
            kept.append(image)
    if not kept:
        reason = problems[0] if problems else "there are none"
        raise UserError(f"--source: none of {len(images)} images can be read ({reason})")
    return kept, problems


def _joined_units(folder: Path, images: Sequence[SourceImage]) -> dict[str, str]:
    """Returns for every unit the first by name of all units that equal images connect it to.

    Their source may call them otherwise: Norway's flag is Svalbard's too.
    """
    parent = {image.unit: image.unit for image in images}

    def root_of(unit: str) -> str:
        while parent[unit] != unit:
            parent[unit] = unit = parent[parent[unit]]
        return unit

    unit_of_content: dict[str, str] = {}
    for image in images:
        first = unit_of_content.setdefault(sha256_of(folder / image.path), image.unit)
        root, other = sorted((root_of(first), root_of(image.unit)))
        parent[other] = root
    return {unit: root_of(unit) for unit in parent}


def assign_units(
    images: Sequence[SourceImage], sentences: Iterable[Sentence], shares: Mapping[str, float], seed: int
) -> dict[str, str]:
    """Assigns every unit to ``train``, ``valid`` or ``test``.

    The units of images are visited in an order drawn from ``seed``; a held-out part takes them until it has its share
    of the units, but never the last one of a family of several. Units that only sentences have are divided by the same
    shares.

    Raises:
        UserError: too few units for the parts.
    """
    families = {image.unit: image.family for image in images}
    assigned = _draw(families, shares, random.Random(seed))
    if any(shares[split] > 0 and split not in assigned.values() for split in SPLITS):
        raise UserError(
            f"--source: {len(families)} different image(s) cannot be split into {', '.join(SPLITS)}: give more, or "
            f"other fractions"
        )
    others = {sentence.unit: "" for sentence in sentences if sentence.unit not in families}
    return {**assigned, **_draw(others, shares, random.Random(seed + 1))}


def _draw(families: Mapping[str, str], shares: Mapping[str, float], generator: random.Random) -> dict[str, str]:
    sizes = Counter(families.values())
    left = sizes.copy()
    order = sorted(families)
    generator.shuffle(order)
    assigned = dict.fromkeys(families, "train")
    counts = {split: round(shares[split] * len(families)) or int(shares[split] > 0) for split in ("test", "valid")}
    wanted = [split for split, count in counts.items() for _ in range(count)]
    for unit in order:
        family = families[unit]
        if wanted and not (family and sizes[family] > 1 and left[family] < 2):
            left[family] -= 1
            assigned[unit] = wanted.pop(0)
    return assigned
