"""What can be answered without looking: baselines that a model of images has to beat."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping

from ..common.errors import UserError


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
