"""The metrics of the COCO caption evaluation; METEOR and SPICE are Java programs, run as they are or not at all.

The programs are in pycocoevalcap (the extra ``captions``).
"""

import importlib
import importlib.util
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...common.errors import UserError
from .scores import CiderD, bleu, rouge_l
from .tokenizer import tokenize

Words = list[str]
_SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


class Unavailable(Exception):
    """Why a metric cannot be computed here."""


def score_captions(
    captions: Mapping[int, str], references: Mapping[int, Sequence[str]], with_java: bool = True
) -> tuple[dict[str, float], dict[str, str]]:
    """Score one caption for each image of a set.

    CIDEr's weights are computed on the set's references, so sets do not compare.

    Args:
        captions: by image id.
        references: the images' own captions, at least one each.
        with_java: compute METEOR and SPICE if their programs are on this machine (METEOR: English, about 20 seconds).

    Returns:
        the metrics times 100, as in papers' tables, by their usual names, CIDEr, which can exceed 100, first; and why
        others are absent.

    Raises:
        UserError: if captions and references are not of the same images, or there is none.
    """
    _require_same_images(captions, references)
    images = list(references)
    ours = [tokenize(captions[image]) for image in images]
    theirs = [[tokenize(caption) for caption in references[image]] for image in images]
    cider = CiderD(theirs)
    found = {"CIDEr": _mean([cider.score(index, words) for index, words in enumerate(ours)])}
    found |= {f"BLEU-{order}": value for order, value in enumerate(bleu(ours, theirs), start=1)}
    found["ROUGE-L"] = _mean([rouge_l(words, refs) for words, refs in zip(ours, theirs)])
    absent = {}
    for name, compute in JAVA_METRICS.items():
        try:
            if not with_java:
                raise Unavailable("not asked for")
            found[name] = compute(ours, theirs)
        except Unavailable as reason:
            absent[name] = str(reason)
    return {name: 100 * value for name, value in found.items()}, absent


def _require_same_images(captions: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> None:
    if not references:
        raise UserError("there is no image to score captions of")
    for has, lacks, what in ((references, captions, "caption"), (captions, references, "reference")):
        missing = [image for image in has if image not in lacks]
        if missing:
            raise UserError(f"{len(missing)} of {len(has)} images have no {what}, first image_id {missing[0]}")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def meteor(captions: list[Words], references: list[list[Words]]) -> float:
    """METEOR 1.5 for English, in [0, 1].

    Raises:
        Unavailable: without pycocoevalcap or Java, or if the program fails.
    """
    return _run(_package("meteor.meteor").Meteor, captions, references)


def spice(captions: list[Words], references: list[list[Words]]) -> float:
    """SPICE for English, in [0, 1].

    pycocoevalcap would download two of its files; here they are only used if the user has put them in their place.

    Raises:
        Unavailable: without pycocoevalcap, Java or the files, or if the program fails.
    """
    package = _package("spice.spice")
    folder = Path(package.__file__).parent / "lib"
    missing = [name for name in _SPICE_JARS if not (folder / name).is_file()]
    if missing:
        raise Unavailable(f"pycocoevalcap/spice/lib lacks {' and '.join(missing)} of Stanford CoreNLP 3.6.0")
    return _run(package.Spice, captions, references)


JAVA_METRICS: dict[str, Callable[[list[Words], list[list[Words]]], float]] = {"METEOR": meteor, "SPICE": spice}


def _package(module: str) -> Any:
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise Unavailable("pycocoevalcap is not installed: pip install 'mhmoe-fairseq[captions]'")
    if shutil.which("java") is None:
        raise Unavailable("there is no java on this machine")
    return importlib.import_module(f"pycocoevalcap.{module}")


def _run(scorer: Callable[[], Any], captions: list[Words], references: list[list[Words]]) -> float:
    results = {index: [" ".join(words)] for index, words in enumerate(captions)}
    truth = {index: [" ".join(words) for words in refs] for index, refs in enumerate(references)}
    try:
        return float(scorer().compute_score(truth, results)[0])
    except Exception as error:  # whatever a Java program that dies makes of its wrapper
        raise Unavailable(f"its program failed ({type(error).__name__}: {error})") from error
