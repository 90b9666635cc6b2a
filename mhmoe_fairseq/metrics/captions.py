"""Scores of captions by the definitions of the COCO caption evaluation (Chen et al., arXiv 1504.00325).

They agree with pycocoevalcap: BLEU with the closest reference length and no smoothing, ROUGE-L with beta 1.2 (Lin,
2004), CIDEr-D with n-grams up to 4, clipping, sigma 6 and a factor of 10 (Vedantam et al., arXiv 1411.5726). METEOR and
SPICE are Java programs in pycocoevalcap (the extra ``captions``), run as they are or not at all.
"""

import importlib
import importlib.util
import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sacrebleu.metrics import BLEU

from ..common.errors import UserError
from ..common.files import read_json
from .caption_words import tokenize

Words = Sequence[str]
_BETA = 1.2
_ORDERS = 4
_SIGMA = 6.0
# The Java programs, and the files that pycocoevalcap would download for them.
_JARS = {"METEOR": (), "SPICE": ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")}
_MOST_CANDIDATES = 200
_MOST_IMAGES = 500


def read_ground_truth(path: Path) -> dict[int, list[str]]:
    """The captions of every image of a file in COCO's own layout, such as ``coco_karpathy_val_gt.json``.

    The file is ``{"images": [{"id"}, ...], "annotations": [{"image_id", "id", "caption"}, ...]}``, other fields are
    ignored.

    Returns:
        references by image id, in the file's order.

    Raises:
        FileNotFoundError: if there is no such file.
        UserError: naming the file and what is wrong in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it holds the captions that a model's are scored against")
    content = read_json(path)
    try:
        references: dict[int, list[str]] = {_image_id(image["id"]): [] for image in content["images"]}
        for number, annotation in enumerate(content["annotations"], start=1):
            image = _image_id(annotation["image_id"])
            if image not in references:
                raise UserError(f"{path}: annotation {number} is of image {image}, which is not in its list of images")
            if not isinstance(annotation["caption"], str):
                raise UserError(f"{path}: annotation {number} has no text in caption")
            references[image].append(annotation["caption"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not a file of COCO captions: {error!r} is missing or malformed") from error
    bare = next((image for image, captions in references.items() if not captions), None)
    if bare is not None or not references:
        raise UserError(f"{path}: " + ("no image in it" if not references else f"image {bare} has no caption"))
    return references


def _image_id(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"image id {value!r}")
    return value


def score_captions(
    captions: Mapping[int, str], references: Mapping[int, Sequence[str]], with_java: bool = True
) -> tuple[dict[str, float], dict[str, str]]:
    """Score one caption for each image of a set.

    CIDEr's weights are computed on the set's references, so sets do not compare.

    Args:
        captions: by image id.
        references: the captions of the same images, at least one each.
        with_java: compute METEOR and SPICE if their programs are on this machine (METEOR: English, about 20 seconds).

    Returns:
        the metrics times 100, as in papers' tables, by their usual names, CIDEr, which can exceed 100, first; and why
        others are absent.
    """
    ours = [tokenize(captions[image]) for image in references]
    theirs = [[tokenize(caption) for caption in written] for written in references.values()]
    cider = CiderD(theirs)
    found = {"CIDEr": sum(cider.score(index, words) for index, words in enumerate(ours)) / len(ours)}
    found |= {f"BLEU-{order}": value for order, value in enumerate(bleu(ours, theirs), start=1)}
    found["ROUGE-L"] = sum(map(rouge_l, ours, theirs)) / len(ours)
    absent = {}
    for name in _JARS:
        score = _java_score(name, ours, theirs) if with_java else "not asked for"
        if isinstance(score, str):
            absent[name] = score
        else:
            found[name] = score
    return {name: 100 * value for name, value in found.items()}, absent


def _java_score(name: str, captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> float | str:
    """METEOR 1.5 or SPICE for English, in [0, 1], or why it cannot be computed here.

    What pycocoevalcap would download is only used if the user has put it in its place.
    """
    if importlib.util.find_spec("pycocoevalcap") is None:
        return "pycocoevalcap is not installed: pip install 'mhmoe-fairseq[captions]'"
    if shutil.which("java") is None:
        return "there is no java on this machine"
    module = name.lower()
    package = importlib.import_module(f"pycocoevalcap.{module}.{module}")
    folder = Path(str(package.__file__)).parent / "lib"
    missing = [jar for jar in _JARS[name] if not (folder / jar).is_file()]
    if missing:
        return f"pycocoevalcap/{module}/lib lacks {' and '.join(missing)} of Stanford CoreNLP 3.6.0"
    results = {index: [" ".join(words)] for index, words in enumerate(captions)}
    truth = {index: [" ".join(words) for words in written] for index, written in enumerate(references)}
    try:
        return float(getattr(package, name.capitalize())().compute_score(truth, results)[0])
    except Exception as error:  # whatever a Java program that dies makes of its wrapper
        return f"its program failed ({type(error).__name__}: {error})"


def best_constant_caption(training: Mapping[int, Sequence[str]]) -> str:
    """The training caption with the highest CIDEr if it is given to all training images; of equals the first.

    Where there are many, of the 200 most frequent captions, on at most 500 images evenly spread over the set.

    Args:
        training: captions by image, at least one image with at least one.
    """
    counts = Counter(caption for captions in training.values() for caption in captions)
    candidates = [caption for caption, _ in counts.most_common(_MOST_CANDIDATES)]
    images = list(training.values())[:: math.ceil(len(training) / _MOST_IMAGES)]
    cider = CiderD([[tokenize(caption) for caption in captions] for captions in images])

    def total(caption: str) -> float:
        words = tokenize(caption)
        return sum(cider.score(image, words) for image in range(len(cider)))

    return max(candidates, key=total)


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
    orders = range(1, _ORDERS + 1)
    scorers = (BLEU(max_ngram_order=n, tokenize="none", smooth_method="none", force=True) for n in orders)
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
        before = list(lengths)
        for index, other in enumerate(two):
            lengths[index + 1] = before[index] + 1 if word == other else max(before[index + 1], lengths[index])
    return lengths[-1]


class _Vector(NamedTuple):
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
    for weights, others, *norms in zip(hypothesis.weights, reference.weights, hypothesis.norms, reference.norms):
        if all(norms):
            shared = ((ngram, weight) for ngram, weight in weights.items() if ngram in others)
            product = sum(min(weight, others[ngram]) * others[ngram] for ngram, weight in shared)
            total += product / math.prod(norms)
    return total / _ORDERS * math.exp(-((hypothesis.length - reference.length) ** 2) / (2 * _SIGMA**2))
