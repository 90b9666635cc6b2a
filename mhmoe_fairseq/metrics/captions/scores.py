"""BLEU, ROUGE-L and CIDEr-D of captions that are split into words.

They follow the definitions of the COCO caption evaluation (Chen et al., arXiv 1504.00325) and agree with pycocoevalcap:
BLEU with the closest reference length and no smoothing, ROUGE-L with beta 1.2 (Lin, 2004), CIDEr-D with n-grams up to
4, clipping, sigma 6 and a factor of 10 (Vedantam et al., arXiv 1411.5726).
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sacrebleu.metrics import BLEU

Words = Sequence[str]
BLEU_ORDERS = (1, 2, 3, 4)
_BETA = 1.2
_ORDERS = 4
_SIGMA = 6.0


def bleu(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> tuple[float, ...]:
    """BLEU-1 to BLEU-4 of a corpus, in [0, 1], by sacrebleu.

    Where no n-gram of an order matches, BLEU is 0. pycocoevalcap adds 1e-15 to every count and so gets about 1e-4, or
    0.03 if all captions are shorter than n words.

    Args:
        captions: one per image.
        references: at least one per image.
    """
    most = max(map(len, references))
    streams = [[" ".join(refs[k]) if k < len(refs) else None for refs in references] for k in range(most)]
    hypotheses = [" ".join(words) for words in captions]
    scorers = (BLEU(max_ngram_order=n, tokenize="none", smooth_method="none", force=True) for n in BLEU_ORDERS)
    # sacrebleu takes None for a reference that an image does not have, though its types do not say so.
    return tuple(scorer.corpus_score(hypotheses, streams).score / 100 for scorer in scorers)  # type: ignore[arg-type]


def rouge_l(caption: Words, references: Sequence[Words]) -> float:
    """F score, in [0, 1], of the best precision and the best recall of the longest common subsequence."""
    common = [(_longest_common(caption, reference), len(reference)) for reference in references]
    precision = max(length for length, _ in common) / max(len(caption), 1)
    recall = max(length / max(size, 1) for length, size in common)
    if not precision or not recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _longest_common(one: Words, two: Words) -> int:
    """Length of the longest common subsequence."""
    lengths = [0] * (len(two) + 1)
    for word in one:
        diagonal = 0
        for index, other in enumerate(two, start=1):
            diagonal, lengths[index] = (
                lengths[index],
                diagonal + 1 if word == other else max(lengths[index], lengths[index - 1]),
            )
    return lengths[-1]


@dataclass(frozen=True)
class _Vector:
    """TF-IDF weights of n-grams, by order; their norms; and the number of pairs of words, CIDEr's length."""

    weights: tuple[dict[tuple[str, ...], float], ...]
    norms: tuple[float, ...]
    length: int


class CiderD:
    """CIDEr-D of captions against the references of one set of images.

    An n-gram's weight falls with the number of images in whose references it occurs: scores of different sets do not
    compare, and those of a few images mean nothing; of a single image the score is 0.

    Args:
        references: for every image at least one.

    Raises:
        ValueError: if an image has none.
    """

    def __init__(self, references: Sequence[Sequence[Words]]) -> None:
        counts = [[_count_ngrams(words) for words in image] for image in references]
        if not counts or not all(counts):
            raise ValueError("CIDEr needs at least one image, and every image at least one reference")
        self._log_images = math.log(len(counts))
        images_with = Counter(ngram for image in counts for ngram in set().union(*image))
        self._log_frequency = {ngram: math.log(number) for ngram, number in images_with.items()}
        self._references = [[self._vector(count) for count in image] for image in counts]

    def __len__(self) -> int:
        return len(self._references)

    def score(self, image: int, caption: Words) -> float:
        """Score of one image's caption: 0 to 10, so that the COCO tables' figure is 100 times the mean over images.

        Args:
            image: its index in ``references``.
        """
        hypothesis = self._vector(_count_ngrams(caption))
        references = self._references[image]
        return 10 * sum(_similarity(hypothesis, reference) for reference in references) / len(references)

    def _vector(self, counts: Counter[tuple[str, ...]]) -> _Vector:
        weights: tuple[dict[tuple[str, ...], float], ...] = tuple({} for _ in range(_ORDERS))
        for ngram, count in counts.items():
            weights[len(ngram) - 1][ngram] = count * (self._log_images - self._log_frequency.get(ngram, 0.0))
        norms = tuple(math.sqrt(sum(weight * weight for weight in order.values())) for order in weights)
        return _Vector(weights, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2))


def _count_ngrams(words: Words) -> Counter[tuple[str, ...]]:
    return Counter(
        tuple(words[start : start + n]) for n in range(1, _ORDERS + 1) for start in range(len(words) - n + 1)
    )


def _similarity(hypothesis: _Vector, reference: _Vector) -> float:
    """Clipped cosine, mean over the orders, less a penalty for a difference in length."""
    total = 0.0
    for weights, others, norm, other_norm in zip(
        hypothesis.weights, reference.weights, hypothesis.norms, reference.norms
    ):
        if norm and other_norm:
            product = sum(
                min(weight, others[ngram]) * others[ngram] for ngram, weight in weights.items() if ngram in others
            )
            total += product / (norm * other_norm)
    return total / _ORDERS * math.exp(-((hypothesis.length - reference.length) ** 2) / (2 * _SIGMA**2))
