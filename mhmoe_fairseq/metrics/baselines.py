"""What can be reached without looking at the images: baselines that a model of images has to beat."""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence

from ..common.errors import UserError
from .captions import CiderD, tokenize

_MOST_CANDIDATES = 200
_MOST_IMAGES = 500


class TextOnly:
    """Answers each text as the training set most often does, and a text that it has not as it most often does at all.

    Args:
        examples: texts of the training set, each with the weights of its labels.

    Attributes:
        majority: the label of the largest total weight; of equal ones the lowest.

    Raises:
        UserError: if no example has a label.
    """

    def __init__(self, examples: Iterable[tuple[Hashable, Mapping[int, float]]]) -> None:
        by_text: dict[Hashable, Counter[int]] = {}
        total: Counter[int] = Counter()
        for text, weights in examples:
            by_text.setdefault(text, Counter()).update(weights)
            total.update(weights)
        if not total:
            raise UserError("the training set has no labels")
        self.majority = _heaviest(total)
        self._best = {text: _heaviest(weights) for text, weights in by_text.items() if weights}

    def answer(self, text: Hashable) -> int:
        """The label."""
        return self._best.get(text, self.majority)


def _heaviest(weights: Counter[int]) -> int:
    return min(weights, key=lambda label: (-weights[label], label))


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
        return sum(cider.score(image, words) for image in range(len(cider)))

    return max(candidates, key=total)
