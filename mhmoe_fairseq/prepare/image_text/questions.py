"""Questions with answers that a picture's metadata give: derived data, not VQAv2.

The pictures stay as they are; only the wording is made, and every answer is read from what the source says. Yes-or-no
questions come in twos: each is asked of a picture for which it is true and of one for which it is not, so that its
words alone do not tell the answer.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Optional, Sequence

from .pictures import Picture

YES, NO = "yes", "no"


class Question(NamedTuple):
    """A question about one picture; ``form`` is the kind of question."""

    path: str
    form: str
    text: str
    answer: str


def derive_questions(pictures: Sequence[Picture], seed: int, key: str) -> list[Question]:
    """All questions about the pictures of one part, one picture per unit and form.

    Args:
        pictures: of one part.
        seed: decides which picture of a unit, and which counterparts.
        key: of the part; two parts make other choices.
    """
    generator = random.Random(f"{seed} {key}")
    shown = _one_of_each_unit(pictures, generator)
    toned = _one_of_each_unit([picture for picture in pictures if "tone" in picture.facts], generator)
    questions = [
        *_open(shown, "group", "what kind of picture is this?", lambda picture: picture.group),
        *_open(shown, "subgroup", "what finer kind of picture is this?", lambda picture: picture.subgroup),
        *_open(shown, "person", "who is shown?", lambda picture: picture.facts.get("person")),
        *_open(shown, "colour", "what colour is it?", lambda picture: picture.facts.get("colour")),
        *_open(toned, "tone", "which skin tone is shown?", lambda picture: picture.facts.get("tone")),
        *_yes_or_no(shown, "is group", "is this a picture of the kind {}?", _group, generator),
        *_yes_or_no(shown, "is colour", "is it {}?", _colour, generator),
        *_yes_or_no(shown, "fits", "does the word {} fit?", lambda picture: picture.keywords, generator),
    ]
    generator.shuffle(questions)
    return questions


def _group(picture: Picture) -> Sequence[str]:
    return [picture.group] if picture.group else []


def _colour(picture: Picture) -> Sequence[str]:
    return [picture.facts["colour"]] if "colour" in picture.facts else []


def _one_of_each_unit(pictures: Sequence[Picture], generator: random.Random) -> list[Picture]:
    units: dict[str, list[Picture]] = defaultdict(list)
    for picture in pictures:
        units[picture.unit].append(picture)
    return [generator.choice(units[unit]) for unit in sorted(units)]


def _open(
    pictures: Iterable[Picture], form: str, text: str, answer: Callable[[Picture], Optional[str]]
) -> Iterator[Question]:
    for picture in pictures:
        if found := answer(picture):
            yield Question(picture.path, form, text, found)


def _yes_or_no(
    pictures: Sequence[Picture],
    form: str,
    text: str,
    values: Callable[[Picture], Sequence[str]],
    generator: random.Random,
) -> Iterator[Question]:
    """For every picture one of its values, asked of it and of another picture that has values, but not this one."""
    candidates = [(picture, set(values(picture))) for picture in pictures if values(picture)]
    for picture, own in candidates:
        value = generator.choice(sorted(own))
        others = [other for other, theirs in candidates if value not in theirs]
        if others:
            yield Question(picture.path, form, text.format(value), YES)
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
        "pictures": len({question.path for question in questions}),
        "forms": dict(sorted(Counter(question.form for question in questions).items())),
    }
