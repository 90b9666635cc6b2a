"""Which image goes to which part: by unit, drawn by a seed, so that no drawing is in two parts."""

from __future__ import annotations

import random
from collections import Counter
from typing import Iterable, Mapping, Sequence

from ...common.errors import UserError
from ..splits import SPLITS
from .images import Sentence, SourceImage


def assign_units(
    images: Sequence[SourceImage],
    sentences: Iterable[Sentence],
    *,
    valid_fraction: float,
    test_fraction: float,
    seed: int,
) -> dict[str, str]:
    """Part of every unit.

    The units of images are visited in an order drawn from ``seed``; a held-out part takes them until it has its share
    of the units, but of a family of several never the last one. Units that only sentences have are divided by the same
    shares.

    Raises:
        UserError: too few units for the parts.
    """
    families = {image.unit: image.family for image in images}
    shares = {"test": test_fraction, "valid": valid_fraction}
    assigned = _draw(families, shares, random.Random(seed))
    empty = [split for split, share in shares.items() if share > 0 and split not in assigned.values()]
    if empty or "train" not in assigned.values():
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
    wanted = {split: round(share * len(families)) or (1 if share else 0) for split, share in shares.items()}
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

    True of every caption where the source knows of no families.

    Args:
        families: those of training images.
        words: those of training captions; see :func:`words_of`.
    """
    captions = image.captions.get(language, [])
    if not image.family:
        return bool(captions)
    return image.family in families and any(words_of(caption) <= words for caption in captions)


def words_of(text: str) -> set[str]:
    """Lower-case words of a caption, without the punctuation around them."""
    return {word.strip(".,:;!?()\"'").lower() for word in text.split()} - {""}
