"""The metrics of the COCO caption evaluation for a set of captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...common.errors import UserError
from . import CiderD, bleu, rouge_l, tokenize
from .java import JAVA_METRICS, Unavailable


@dataclass(frozen=True)
class CaptionScores:
    """Scores times 100, as in papers' tables; CIDEr can exceed 100.

    Attributes:
        images: size of the set: CIDEr's weights are computed on its references, so sets do not compare.
        references: how many captions the images have together.
        bleu: BLEU-1 to BLEU-4.
        rouge_l, cider: means over images.
        meteor, spice: None where they could not be computed.
        absent: why not, by metric.
    """

    images: int
    references: int
    bleu: tuple[float, ...]
    rouge_l: float
    cider: float
    meteor: float | None = None
    spice: float | None = None
    absent: dict[str, str] = field(default_factory=dict)

    def figures(self) -> dict[str, float | None]:
        """Every metric by its usual name."""
        orders = {f"BLEU-{order}": value for order, value in enumerate(self.bleu, start=1)}
        return {**orders, "METEOR": self.meteor, "ROUGE-L": self.rouge_l, "CIDEr": self.cider, "SPICE": self.spice}


def score_captions(
    captions: Mapping[int, str], references: Mapping[int, Sequence[str]], with_java: bool = True
) -> CaptionScores:
    """Score one caption for each image of a set.

    Args:
        captions: by image id.
        references: the images' own captions, at least one each.
        with_java: compute METEOR and SPICE if their programs are on this machine (METEOR: English, about 20 seconds).

    Raises:
        ValueError: if captions and references are not of the same images, or there is none.
    """
    _require_same_images(captions, references)
    images = list(references)
    ours = [tokenize(captions[image]) for image in images]
    theirs = [[tokenize(caption) for caption in references[image]] for image in images]
    cider = CiderD(theirs)
    found, absent = _java_scores(ours, theirs) if with_java else ({}, dict.fromkeys(JAVA_METRICS, "not asked for"))
    return CaptionScores(
        images=len(images),
        references=sum(map(len, theirs)),
        bleu=tuple(100 * value for value in bleu(ours, theirs)),
        rouge_l=100 * _mean([rouge_l(words, refs) for words, refs in zip(ours, theirs)]),
        cider=100 * _mean([cider.score(place, words) for place, words in enumerate(ours)]),
        **found,
        absent=absent,
    )


def _require_same_images(captions: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> None:
    if not references:
        raise UserError("there is no image to score captions of")
    for has, lacks, what in ((references, captions, "caption"), (captions, references, "reference")):
        missing = [image for image in has if image not in lacks]
        if missing:
            raise UserError(f"{len(missing)} of {len(has)} images have no {what}, first image_id {missing[0]}")


def _java_scores(
    captions: list[list[str]], references: list[list[list[str]]]
) -> tuple[dict[str, float], dict[str, str]]:
    found, absent = {}, {}
    for name, compute in JAVA_METRICS.items():
        try:
            found[name] = 100 * compute(captions, references)
        except Unavailable as reason:
            absent[name] = str(reason)
    return found, absent


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
