"""Visual questions and statements about two images, derived from metadata: neither VQAv2 nor NLVR2.

The images stay as they are; only the wording is made, and every answer is read from what the source says. Yes-or-no
questions come in twos: each is asked of an image for which it is true and of one for which it is not, and every
statement is used once where it is true and once where it is false, so that words alone do not tell the answer.
"""

import itertools
import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Optional, Sequence

from ...data.multimodal.index import ANSWERS_FILE, write_answers
from ..archives import Say
from ..splits import SPLITS
from .images import SourceImage
from .indexes import IndexWriter

NOTE = "derived from the images' metadata by templates; neither VQAv2 nor NLVR2"
YES, NO = "yes", "no"
_TRIES = 200

_QUESTIONS = {  # by what they ask for
    "group": "what kind of picture is this?",
    "subgroup": "what finer kind of picture is this?",
    "person": "who is shown?",
    "colour": "what colour is it?",
    "tone": "which skin tone is shown?",
}
# Yes-or-no questions: the wording, and the values for which an image is asked.
_CHECKS: dict[str, tuple[str, Callable[[SourceImage], Iterable[Optional[str]]]]] = {
    "is group": ("is this a picture of the kind {}?", lambda image: [image.group]),
    "is colour": ("is it {}?", lambda image: [image.facts.get("colour")]),
    "fits": ("does the word {} fit?", lambda image: image.keywords),
}
# Statements: the wording, and whether it is true of a left and a right image and the value, which is a kind.
_STATEMENTS: dict[str, tuple[str, Callable[[SourceImage, SourceImage, str], bool]]] = {
    "both": ("both pictures are of the kind {}", lambda a, b, kind: a.group == b.group == kind),
    "exactly one": ("exactly one picture is of the kind {}", lambda a, b, kind: (a.group == kind) != (b.group == kind)),
    "none": ("no picture is of the kind {}", lambda a, b, kind: kind not in (a.group, b.group)),
    "only left": ("only the left picture is of the kind {}", lambda a, b, kind: a.group == kind != b.group),
    "same": ("both pictures are of the same kind", lambda a, b, kind: a.group == b.group),
    "word": ("the word {} fits one of the pictures", lambda a, b, word: word in (*_words(a), *_words(b))),
}


class Derived(NamedTuple):
    """A question about one image, or a statement about a left and a right one, which is answered with yes or no."""

    images: tuple[str, ...]
    form: str
    text: str
    answer: str
    identifier: str = ""


@dataclass(frozen=True)
class DerivedSettings:
    """How many are made."""

    min_answer_count: int = 3  # answers that fewer training questions have are no classes
    statements: int = 10_000  # of the training part; each held-out part has a fifth of that


@dataclass(frozen=True)
class Derivation:
    """Questions and statements of all parts; no image is in two parts."""

    settings: DerivedSettings
    parts: Mapping[str, Sequence[SourceImage]]
    seed: int

    @cached_property
    def questions(self) -> dict[str, list[Derived]]:
        """The questions by part."""
        return {split: derive_questions(self.parts[split], self.seed, split) for split in SPLITS}

    @cached_property
    def statements(self) -> dict[str, list[Derived]]:
        """The statements by part."""
        counts = dict.fromkeys(SPLITS, self.settings.statements // 5) | {"train": self.settings.statements}
        return {split: derive_statements(self.parts[split], counts[split], self.seed, split) for split in SPLITS}

    def training_texts(self) -> Iterable[str]:
        """Returns each wording of the training part once."""
        return dict.fromkeys(made.text for made in (*self.questions["train"], *self.statements["train"]))

    def write(self, writer: IndexWriter, say: Say) -> dict[str, Any]:
        """Writes the indexes; returns what the manifest says, ``files`` being the lines of each file."""
        record: dict[str, Any] = {"note": NOTE, "files": {}}
        answers = answer_vocabulary(self.questions["train"], self.settings.min_answer_count)
        labels = {answer: label for label, answer in enumerate(answers)}
        if len(labels) > 1:  # questions with other answers are left out, as in VQAv2
            known = {split: [made for made in self.questions[split] if made.answer in labels] for split in SPLITS}
            record["files"] |= _write_questions(writer, labels, known)
            record["questions"] = {"answers": len(labels)}
            for split, made in known.items():
                dropped = len(self.questions[split]) - len(made)
                record["questions"][split] = {**_describe("questions", made), "dropped_rare_answers": dropped}
            for split in ("valid", "test"):
                blind = question_only_baseline(known["train"], known[split])
                record["questions"][split]["question_only_accuracy"] = blind
            say(
                f"questions ({NOTE}): {_counts(known)}; {len(labels)} answers; without looking at the test images "
                f"{blind['by_question']:.1f} % are right"
            )
        if self.statements["train"]:
            record["files"] |= writer.write("nlvr2", lambda split: [
                {
                    "image_path": made.images[0], "image2_path": made.images[1], "text_segment": made.text,
                    "label": int(made.answer == YES), "identifier": made.identifier,
                }
                for made in self.statements[split]
            ])  # fmt: skip
            record["statements"] = {
                split: {**_describe("statements", made), "text_only_accuracy": 50.0}  # by construction
                for split, made in self.statements.items()
            }
            say(
                f"statements about two images ({NOTE}): {_counts(self.statements)}; each true once and false once, "
                "text alone 50 %"
            )
        return record


def _write_questions(
    writer: IndexWriter, labels: Mapping[str, int], questions: Mapping[str, list[Derived]]
) -> dict[str, int]:
    write_answers(writer.folder, list(labels))
    qids = itertools.count()
    files = writer.write("vqa", lambda split: [
        {
            "image_path": question.images[0], "text_segment": question.text, "labels": [labels[question.answer]],
            "scores": [1.0], "qid": next(qids),
        }
        for question in questions[split]
    ])  # fmt: skip
    return {**files, ANSWERS_FILE: len(labels)}


def _counts(derived: Mapping[str, list[Derived]]) -> str:
    return ", ".join(f"{split} {len(made)}" for split, made in derived.items())


def _describe(name: str, derived: Sequence[Derived]) -> dict[str, Any]:
    forms = Counter(made.form for made in derived)
    images = {path for made in derived for path in made.images}
    return {name: len(derived), "images": len(images), "forms": dict(sorted(forms.items()))}


def derive_questions(images: Sequence[SourceImage], seed: int, key: str) -> list[Derived]:
    """Returns all questions about the images of one part, one image per unit and form.

    Args:
        seed, key: decide which image of a unit, and which counterparts; two parts have other keys.
    """
    generator = random.Random(f"{seed} {key}")
    shown = _one_of_each_unit(images, generator)
    toned = _one_of_each_unit([image for image in images if "tone" in image.facts], generator)
    questions = [
        Derived((image.path,), form, text, answer)
        for form, text in _QUESTIONS.items()
        for image in (toned if form == "tone" else shown)
        if (answer := {"group": image.group, "subgroup": image.subgroup, **image.facts}.get(form))
    ]
    for form in _CHECKS:
        questions += _yes_or_no(shown, form, generator)
    generator.shuffle(questions)
    return questions


def _one_of_each_unit(images: Sequence[SourceImage], generator: random.Random) -> list[SourceImage]:
    units: dict[str, list[SourceImage]] = defaultdict(list)
    for image in images:
        units[image.unit].append(image)
    return [generator.choice(units[unit]) for unit in sorted(units)]


def _yes_or_no(images: Sequence[SourceImage], form: str, generator: random.Random) -> Iterator[Derived]:
    """Yields for every image one of its values, asked of it and of another image that has values, but not this one."""
    text, values = _CHECKS[form]
    candidates = [(image, own) for image in images if (own := set(filter(None, values(image))))]
    for image, own in candidates:
        value = generator.choice(sorted(own))
        others = [other for other, theirs in candidates if value not in theirs]
        if others:
            yield Derived((image.path,), form, text.format(value), YES)
            yield Derived((generator.choice(others).path,), form, text.format(value), NO)


def answer_vocabulary(questions: Iterable[Derived], min_count: int) -> list[str]:
    """Returns answers that occur at least ``min_count`` times in training, the most frequent first."""
    counts = Counter(sorted(question.answer for question in questions))  # of equals the first by name
    return [answer for answer, number in counts.most_common() if number >= min_count]


def question_only_baseline(train: Sequence[Derived], held_out: Sequence[Derived]) -> dict[str, float]:
    """Returns the accuracy in percent of answering without looking, with the answer most frequent in training.

    Returns:
        ``by_form``: most frequent among all questions of its form; ``by_question``: among questions of the same words,
        where training has them.
    """

    def guesses(field: str) -> dict[str, str]:
        asked: dict[str, list[Derived]] = defaultdict(list)
        for question in train:
            asked[getattr(question, field)].append(question)
        return {key: answer_vocabulary(questions, 1)[0] for key, questions in asked.items()}

    by_form, by_text = guesses("form"), guesses("text")
    right = {
        "by_form": sum(by_form.get(asked.form) == asked.answer for asked in held_out),
        "by_question": sum(by_text.get(asked.text, by_form.get(asked.form)) == asked.answer for asked in held_out),
    }
    return {name: round(100 * count / max(1, len(held_out)), 2) for name, count in right.items()}


def _words(image: SourceImage) -> tuple[str, ...]:
    return (*image.keywords, image.group)


def derive_statements(images: Sequence[SourceImage], count: int, seed: int, key: str) -> list[Derived]:
    """Returns ``count`` statements (rounded down to whole pairs) about pairs of the images of one part.

    There are none when the images are of fewer than three kinds: then most statements have no false case.

    Args:
        images: of one part; those without a kind are left out.
        key: of the part; it begins the identifiers.
    """
    generator = random.Random(f"{seed} {key}")
    shown = sorted((image for image in images if image.group), key=lambda image: image.path)
    if len({image.group for image in shown}) < 3:
        return []
    made: list[Derived] = []
    forms = list(_STATEMENTS)
    for number in range(count // 2):
        form, subject = forms[number % len(forms)], generator.choice(shown)
        value = generator.choice(subject.keywords or (subject.group,)) if form == "word" else subject.group
        pairs = [_draw(form, value, wanted, subject, shown, generator) for wanted in (True, False)]
        if all(pairs):
            text = _STATEMENTS[form][0].format(value)
            made += [
                Derived(pair, form, text, answer, f"{key}-{number}-{index}-0")
                for index, (pair, answer) in enumerate(zip(pairs, (YES, NO)))
            ]
    generator.shuffle(made)
    return made


def _draw(
    form: str, value: str, wanted: bool, subject: SourceImage, images: Sequence[SourceImage], generator: random.Random
) -> tuple[str, ...]:
    """Draws two images of different units; half of the draws have the subject in them, on either side."""
    for _ in range(_TRIES):
        first, second = generator.choice(images), generator.choice(images)
        if generator.random() < 0.5:
            first = subject
        left, right = (first, second) if generator.random() < 0.5 else (second, first)
        if first.unit != second.unit and _STATEMENTS[form][1](left, right, value) == wanted:
            return left.path, right.path
    return ()
