"""What can be reached without looking: one caption for every image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from .captions import CiderD, tokenize

_MOST_CANDIDATES = 200
_MOST_IMAGES = 500


def best_constant_caption(training: Mapping[int, Sequence[str]]) -> str:
    """The training caption with the highest CIDEr if it is given to all training images; of equals the first.

    Where there are many, of the 200 most frequent captions, on 500 images evenly spread over the set.

    Args:
        training: captions by image, at least one image with at least one.
    """
    counts = Counter(caption for captions in training.values() for caption in captions)
    candidates = [caption for caption, _ in counts.most_common(_MOST_CANDIDATES)]
    images = list(training.values())
    step = max(1, len(images) // _MOST_IMAGES)
    cider = CiderD([[tokenize(caption) for caption in captions] for captions in images[::step]])

    def total(caption: str) -> float:
        words = tokenize(caption)
        return sum(cider.score(place, words) for place in range(len(cider)))

    return max(candidates, key=total)
