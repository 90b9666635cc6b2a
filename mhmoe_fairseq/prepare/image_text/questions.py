"""Questions with answers that an image's metadata give: derived data, not VQAv2.

The images stay as they are; only the wording is made, and every answer is read from what the source says. Yes-or-no
questions come in twos: each is asked of an image for which it is true and of one for which it is not, so that its
words alone do not tell the answer.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Optional, Sequence

from .images import SourceImage

YES, NO = "yes", "no"


class Question(NamedTuple):
    """A question about one image; ``form`` is the kind of question."""

    path: str
    form: str
    text: str
    answer: str


def derive_questions(images: Sequence[SourceImage], seed: int, key: str) -> list[Question]:
    """All questions about the images of one part, one image per unit and form.

    Args:
        images: of one part.
        seed: decides which image of a unit, and which counterparts.
        key: of the part; two parts make other choices.
    """
    generator = random.Random(f"{seed} {key}")
    shown = _one_of_each_unit(images, generator)
    toned = _one_of_each_unit([image for image in images if "tone" in image.facts], generator)
    questions = [
        *_open(shown, "group", "what kind of picture is this?", lambda image: image.group),
        *_open(shown, "subgroup", "what finer kind of picture is this?", lambda image: image.subgroup),
        *_open(shown, "person", "who is shown?", lambda image: image.facts.get("person")),
        *_open(shown, "colour", "what colour is it?", lambda image: image.facts.get("colour")),
        *_open(toned, "tone", "which skin tone is shown?", lambda image: image.facts.get("tone")),
        *_yes_or_no(shown, "is group", "is this a picture of the kind {}?", _group, generator),
        *_yes_or_no(shown, "is colour", "is it {}?", _colour, generator),
        *_yes_or_no(shown, "fits", "does the word {} fit?", lambda image: image.keywords, generator),
    ]
    generator.shuffle(questions)
    return questions


def _group(image: SourceImage) -> Sequence[str]:
    return [image.group] if image.group else []


def _colour(image: SourceImage) -> Sequence[str]:
    return [image.facts["colour"]] if "colour" in image.facts else []


def _one_of_each_unit(images: Sequence[SourceImage], generator: random.Random) -> list[SourceImage]:
    units: dict[str, list[SourceImage]] = defaultdict(list)
    for image in images:
        units[image.unit].append(image)
    return [generator.choice(units[unit]) for unit in sorted(units)]


def _open(
    images: Iterable[SourceImage], form: str, text: str, answer: Callable[[SourceImage], Optional[str]]
) -> Iterator[Question]:
    for image in images:
        if found := answer(image):
            yield Question(image.path, form, text, found)


def _yes_or_no(
    images: Sequence[SourceImage],
    form: str,
    text: str,
    values: Callable[[SourceImage], Sequence[str]],
    generator: random.Random,
) -> Iterator[Question]:
    """For every image one of its values, asked of it and of another image that has values, but not this one."""
    candidates = [(image, set(values(image))) for image in images if values(image)]
    for image, own in candidates:
        value = generator.choice(sorted(own))
        others = [other for other, theirs in candidates if value not in theirs]
        if others:
            yield Question(image.path, form, text.format(value), YES)
            yield Question(generator.choice(others).path, form, text.format(value), NO)


def answer_vocabulary(questions: Iterable[Question], min_count: int) -> list[str]:
    """Answers that occur at least ``min_count`` times in training, the most frequent first."""
    counts = Counter(question.answer for question in questions)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [answer for answer, count in ranked if count >= min_count]


def question_only_baseline(train: Sequence[Question], held_out: Sequence[Question]) -> dict[str, float]:
    """Accuracy in percent of answering without looking: with the answer most frequent in training.

    Returns:
        ``by_form``: most frequent among all questions of its form; ``by_question``: among questions of the same words,
        where training has them.
    """
    by_form, by_text = defaultdict(Counter), defaultdict(Counter)
    for question in train:
        by_form[question.form][question.answer] += 1
        by_text[question.text][question.answer] += 1

    def guess(counts: Counter[str]) -> Optional[str]:
        return min(counts, key=lambda answer: (-counts[answer], answer), default=None)

    form_right = sum(guess(by_form[question.form]) == question.answer for question in held_out)
    text_right = sum(
        guess(by_text.get(question.text) or by_form[question.form]) == question.answer for question in held_out
    )
    total = max(1, len(held_out))
    return {"by_form": round(100 * form_right / total, 2), "by_question": round(100 * text_right / total, 2)}


def describe_questions(questions: Sequence[Question]) -> dict[str, Any]:
    """Counts for the manifest."""
    return {
        "questions": len(questions),
        "images": len({question.path for question in questions}),
        "forms": dict(sorted(Counter(question.form for question in questions).items())),
    }
