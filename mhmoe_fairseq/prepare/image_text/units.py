"""Which images are kept, which of them are one unit, and which part a unit goes to: no content is in two parts."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Iterable, Mapping, Sequence

from tqdm import tqdm

from ...common.errors import UserError
from ...common.files import sha256_of
from ...data.images.reading import ImageError, read_image
from ..splits import SPLITS
from .images import OpenedImages, Sentence, SourceImage


def drop_unreadable(folder: Path, images: Sequence[SourceImage]) -> tuple[list[SourceImage], list[str]]:
    """Decodes every image once; files that are no good are deleted.

    Args:
        folder: what the images' paths are relative to.

    Returns:
        the images that are left, and what was wrong with the others.

    Raises:
        UserError: none is left.
    """
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


def join_equal_images(folder: Path, opened: OpenedImages) -> tuple[OpenedImages, int]:
    """Joins units that show the same image, whatever their source calls them: Norway's flag is Svalbard's too.

    Args:
        folder: what the images' paths are relative to.

    Returns:
        what was opened, and how many units went into another one.
    """
    parent = {image.unit: image.unit for image in opened.images}

    def root_of(unit: str) -> str:
        while parent[unit] != unit:
            parent[unit] = unit = parent[parent[unit]]
        return unit

    unit_of_content: dict[str, str] = {}
    for image in opened.images:  # a unit's root is the first by name of all units that equal images connect
        first = unit_of_content.setdefault(sha256_of(folder / image.path), image.unit)
        root, other = sorted((root_of(first), root_of(image.unit)))
        parent[other] = root
    joined = {unit: root_of(unit) for unit in parent}
    images = [replace(image, unit=joined[image.unit]) for image in opened.images]
    sentences = [sentence._replace(unit=joined.get(sentence.unit, sentence.unit)) for sentence in opened.sentences]
    gone = sum(unit != root for unit, root in joined.items())
    return opened._replace(images=images, sentences=sentences), gone


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
    held_out = {split: shares[split] for split in ("test", "valid")}
    wanted = {split: round(share * len(families)) or (1 if share else 0) for split, share in held_out.items()}
    for unit in order:
        split = next((split for split, count in wanted.items() if count), None)
        if split is None:
            break
        family = families[unit]
        if family and sizes[family] > 1 and left[family] < 2:
            continue
        left[family] -= 1
        wanted[split] -= 1
        assigned[unit] = split
    return assigned


def has_known_caption(image: SourceImage, language: str, families: set[str], words: set[str]) -> bool:
    """Whether a held-out image's caption can be put together from what training has.

    True for every caption where the source knows of no families.

    Args:
        families: the families of training images.
        words: the words of training captions; see :func:`words_of`.
    """
    captions = image.captions.get(language, [])
    if not image.family:
        return bool(captions)
    return image.family in families and any(words_of(caption) <= words for caption in captions)


def words_of(text: str) -> set[str]:
    """Returns the lower-case words of a caption, without the punctuation around them."""
    return {word.strip(".,:;!?()\"'").lower() for word in text.split()} - {""}
