"""Visual questions and statements about two images, derived from metadata: neither VQAv2 nor NLVR2.

The images stay as they are; only the wording is made, and every answer is read from what the source says. Yes-or-no
questions come in twos: each is asked of an image for which it is true and of one for which it is not, and every
statement is used once where it is true and once where it is false, so that words alone do not tell the answer.
"""

import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Optional, Sequence

from ...data.multimodal.answers import write_answers
from ..archives import Say
from ..splits import SPLITS
from .images import SourceImage
from .indexes import IndexWriter

NOTE = "derived from the images' metadata by templates; neither VQAv2 nor NLVR2"
YES, NO = "yes", "no"
_TRIES = 200


class Question(NamedTuple):
    """A question about one image; ``form`` is the kind of question."""

    path: str
    form: str
    text: str
    answer: str


class Statement(NamedTuple):
    """A statement about a left and a right image, and whether it is true of them."""

    left: str
    right: str
    form: str
    text: str
    is_true: bool
    identifier: str


@dataclass(frozen=True)
class DerivedSettings:
    """How many are made.

    Args:
        min_answer_count: answers that fewer training questions have are no classes.
        statements: of the training part; each held-out part has a fifth of that.
    """

    min_answer_count: int = 3
    statements: int = 10_000


class Derivation:
    """Questions and statements of all parts; no image is in two parts."""

    def __init__(self, settings: DerivedSettings, parts: Mapping[str, Sequence[SourceImage]], seed: int):
        self._settings = settings
        self._parts = parts
        self._seed = seed

    @cached_property
    def questions(self) -> dict[str, list[Question]]:
        """The questions by part."""
        return {split: derive_questions(self._parts[split], self._seed, split) for split in SPLITS}

    @cached_property
    def statements(self) -> dict[str, list[Statement]]:
        """The statements by part."""
        counts = dict.fromkeys(SPLITS, self._settings.statements // 5) | {"train": self._settings.statements}
        return {split: derive_statements(self._parts[split], counts[split], self._seed, split) for split in SPLITS}

    def training_texts(self) -> Iterator[str]:
        """Yields each wording of the training part once."""
        texts = [question.text for question in self.questions["train"]]
        yield from dict.fromkeys([*texts, *(statement.text for statement in self.statements["train"])])

    def write(self, writer: IndexWriter, say: Say) -> dict[str, Any]:
        """Writes the indexes; returns what the manifest says, ``files`` being the lines of each file."""
        files: dict[str, Any] = {}
        record: dict[str, Any] = {"note": NOTE}
        answers = answer_vocabulary(self.questions["train"], self._settings.min_answer_count)
        if len(answers) > 1:
            files |= {**self._write_questions(writer, answers), "answer2label.txt": len(answers)}
            record["questions"] = self._describe_questions(answers, say)
        if self.statements["train"]:
            files |= self._write_statements(writer)
            record["statements"] = {split: _describe_statements(made) for split, made in self.statements.items()}
            counts = ", ".join(f"{split} {len(made)}" for split, made in self.statements.items())
            say(f"statements about two images ({NOTE}): {counts}; each true once and false once, text alone 50 %")
        return {**record, "files": files}

    def _write_questions(self, writer: IndexWriter, answers: Sequence[str]) -> dict[str, Any]:
        """Writes questions whose answer is one of ``answers``; others are left out, as in VQAv2."""
        labels = {answer: label for label, answer in enumerate(answers)}
        counts, qid = {}, 0
        for split in SPLITS:
            kept = [question for question in self.questions[split] if question.answer in labels]
            segments = writer.encode([question.text for question in kept])
            rows = [
                {
                    "image_path": question.path, "text_segment": segment, "labels": [labels[question.answer]],
                    "scores": [1.0], "qid": qid + number,
                }
                for number, (question, segment) in enumerate(zip(kept, segments))
            ]  # fmt: skip
            qid += len(rows)
            counts |= writer.write("vqa", split, rows)
        write_answers(writer.folder, answers)
        return counts

    def _write_statements(self, writer: IndexWriter) -> dict[str, Any]:
        counts = {}
        for split in SPLITS:
            segments = writer.encode([statement.text for statement in self.statements[split]])
            rows = [
                {
                    "image_path": statement.left, "image2_path": statement.right, "text_segment": segment,
                    "label": int(statement.is_true), "identifier": statement.identifier,
                }
                for statement, segment in zip(self.statements[split], segments)
            ]  # fmt: skip
            counts |= writer.write("nlvr2", split, rows)
        return counts

    def _describe_questions(self, answers: Sequence[str], say: Say) -> dict[str, Any]:
        record: dict[str, Any] = {"answers": len(answers)}
        known = {split: [one for one in made if one.answer in set(answers)] for split, made in self.questions.items()}
        for split, made in known.items():
            record[split] = {
                "questions": len(made),
                "images": len({question.path for question in made}),
                "forms": _forms(made),
                "dropped_rare_answers": len(self.questions[split]) - len(made),
            }
            if split != "train":
                record[split]["question_only_accuracy"] = question_only_baseline(known["train"], made)
        say(
            f"questions ({NOTE}): {', '.join(f'{split} {len(made)}' for split, made in known.items())}; "
            f"{len(answers)} answers; without looking at the test images "
            f"{record['test']['question_only_accuracy']['by_question']:.1f} % are right"
        )
        return record


def _describe_statements(statements: Sequence[Statement]) -> dict[str, Any]:
    return {
        "statements": len(statements),
        "images": len({path for statement in statements for path in (statement.left, statement.right)}),
        "forms": _forms(statements),
        "text_only_accuracy": 50.0,  # by construction
    }


def _forms(made: Sequence[Question | Statement]) -> dict[str, int]:
    return dict(sorted(Counter(question.form for question in made).items()))


def derive_questions(images: Sequence[SourceImage], seed: int, key: str) -> list[Question]:
    """Returns all questions about the images of one part, one image per unit and form.

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
        *_yes_or_no(shown, "is group", "is this a picture of the kind {}?", lambda image: [image.group], generator),
        *_yes_or_no(shown, "is colour", "is it {}?", lambda image: [image.facts.get("colour")], generator),
        *_yes_or_no(shown, "fits", "does the word {} fit?", lambda image: image.keywords, generator),
    ]
    generator.shuffle(questions)
    return questions


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
    values: Callable[[SourceImage], Sequence[Optional[str]]],
    generator: random.Random,
) -> Iterator[Question]:
    """Yields for every image one of its values, asked of it and of another image that has values, but not this one."""
    candidates = [(image, own) for image in images if (own := set(filter(None, values(image))))]
    for image, own in candidates:
        value = generator.choice(sorted(own))
        others = [other for other, theirs in candidates if value not in theirs]
        if others:
            yield Question(image.path, form, text.format(value), YES)
            yield Question(generator.choice(others).path, form, text.format(value), NO)


def answer_vocabulary(questions: Iterable[Question], min_count: int) -> list[str]:
    """Returns answers that occur at least ``min_count`` times in training, the most frequent first."""
    counts = Counter(question.answer for question in questions)
    return [answer for answer in sorted(counts, key=lambda answer: (-counts[answer], answer))
            if counts[answer] >= min_count]  # fmt: skip


def question_only_baseline(train: Sequence[Question], held_out: Sequence[Question]) -> dict[str, float]:
    """Returns the accuracy in percent of answering without looking, with the answer most frequent in training.

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

    def accuracy(counts_for: Callable[[Question], Counter[str]]) -> float:
        right = sum(guess(counts_for(question)) == question.answer for question in held_out)
        return round(100 * right / max(1, len(held_out)), 2)

    return {
        "by_form": accuracy(lambda question: by_form[question.form]),
        "by_question": accuracy(lambda question: by_text.get(question.text) or by_form[question.form]),
    }


class Form(NamedTuple):
    """A kind of statement.

    Args:
        text: with a place for the value.
        value: what a statement about an image says, such as its kind.
        holds: whether it is true for a left and a right image and the value.
    """

    text: str
    value: Callable[[SourceImage, random.Random], str]
    holds: Callable[[SourceImage, SourceImage, str], bool]


def _kind(image: SourceImage, generator: random.Random) -> str:
    return image.group


def _word(image: SourceImage, generator: random.Random) -> str:
    return generator.choice(image.keywords or (image.group,))


_FORMS = {
    "both": Form("both pictures are of the kind {}", _kind, lambda a, b, kind: a.group == b.group == kind),
    "exactly one": Form(
        "exactly one picture is of the kind {}", _kind, lambda a, b, kind: (a.group == kind) != (b.group == kind)
    ),
    "none": Form("no picture is of the kind {}", _kind, lambda a, b, kind: kind not in (a.group, b.group)),
    "only left": Form("only the left picture is of the kind {}", _kind, lambda a, b, kind: a.group == kind != b.group),
    "same": Form("both pictures are of the same kind", _kind, lambda a, b, kind: a.group == b.group),
    "word": Form(
        "the word {} fits one of the pictures", _word,
        lambda a, b, word: word in (*a.keywords, a.group, *b.keywords, b.group),
    ),
}  # fmt: skip


def derive_statements(images: Sequence[SourceImage], count: int, seed: int, key: str) -> list[Statement]:
    """Returns ``count`` statements (rounded down to whole pairs) about pairs of the images of one part.

    Args:
        images: of one part; those without a kind are left out.
        seed: decides everything that is drawn.
        key: of the part; it begins the identifiers.

    Returns:
        nothing when the images are of fewer than three kinds: then most statements have no false case.
    """
    generator = random.Random(f"{seed} {key}")
    shown = sorted((image for image in images if image.group), key=lambda image: image.path)
    if len({image.group for image in shown}) < 3:
        return []
    made: list[Statement] = []
    names = list(_FORMS)
    for number in range(count // 2):
        name = names[number % len(names)]
        form, subject = _FORMS[name], generator.choice(shown)
        value = form.value(subject, generator)
        pairs = [_draw(form, value, wanted, subject, shown, generator) for wanted in (True, False)]
        if None in pairs:
            continue
        for index, (pair, is_true) in enumerate(zip(pairs, (True, False))):
            left, right = (image.path for image in pair)
            text, identifier = form.text.format(value), f"{key}-{number}-{index}-0"
            made.append(Statement(left, right, name, text, is_true, identifier))
    generator.shuffle(made)
    return made


def _draw(
    form: Form, value: str, wanted: bool, subject: SourceImage, images: Sequence[SourceImage], generator: random.Random
) -> Optional[tuple[SourceImage, SourceImage]]:
    """Draws two images of different units; half of the draws have the subject in them, on either side."""
    for _ in range(_TRIES):
        first, second = generator.choice(images), generator.choice(images)
        if generator.random() < 0.5:
            first = subject
        pair = (first, second) if generator.random() < 0.5 else (second, first)
        if first.unit != second.unit and form.holds(*pair, value) == wanted:
            return pair
    return None
