"""True and false statements about two images, from their metadata: derived data, not NLVR2.

Every statement is used once where it is true and once where it is false, so that its words tell nothing.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any, Callable, NamedTuple, Optional, Sequence

from .images import SourceImage

Rule = Callable[[SourceImage, SourceImage], bool]
Form = Callable[[SourceImage, random.Random], tuple[str, Rule]]
_TRIES = 200


class Statement(NamedTuple):
    """A statement about a left and a right image, and whether it is true of them."""

    left: str
    right: str
    form: str
    text: str
    is_true: bool
    identifier: str


def derive_statements(images: Sequence[SourceImage], count: int, seed: int, key: str) -> list[Statement]:
    """``count`` statements (rounded down to whole pairs) about pairs of the images of one part.

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
    forms = list(_FORMS)
    for number in range(count // 2):
        form = forms[number % len(forms)]
        true_and_false = _make(_FORMS[form], shown, generator)
        if true_and_false is None:
            continue
        text, pairs = true_and_false
        for place, (pair, is_true) in enumerate(zip(pairs, (True, False))):
            left, right = (image.path for image in pair)
            made.append(Statement(left, right, form, text, is_true, f"{key}-{number}-{place}-0"))
    generator.shuffle(made)
    return made


def _both(image: SourceImage, generator: random.Random) -> tuple[str, Rule]:
    group = image.group
    return f"both pictures are of the kind {group}", lambda left, right: left.group == right.group == group


def _exactly_one(image: SourceImage, generator: random.Random) -> tuple[str, Rule]:
    group = image.group
    return (
        f"exactly one picture is of the kind {group}",
        lambda left, right: (left.group == group) != (right.group == group),
    )


def _none(image: SourceImage, generator: random.Random) -> tuple[str, Rule]:
    group = image.group
    return f"no picture is of the kind {group}", lambda left, right: group not in (left.group, right.group)


def _left(image: SourceImage, generator: random.Random) -> tuple[str, Rule]:
    group = image.group
    return (
        f"only the left picture is of the kind {group}",
        lambda left, right: left.group == group and right.group != group,
    )


def _same(image: SourceImage, generator: random.Random) -> tuple[str, Rule]:
    return "both pictures are of the same kind", lambda left, right: left.group == right.group


def _word(image: SourceImage, generator: random.Random) -> tuple[str, Rule]:
    word = generator.choice(image.keywords or (image.group,))
    return f"the word {word} fits one of the pictures", lambda left, right: any(
        word in (*shown.keywords, shown.group) for shown in (left, right)
    )


_FORMS: dict[str, Form] = {
    "both": _both, "exactly one": _exactly_one, "none": _none, "only left": _left, "same": _same, "word": _word,
}  # fmt: skip


def _make(
    form: Form, images: Sequence[SourceImage], generator: random.Random
) -> Optional[tuple[str, list[tuple[SourceImage, SourceImage]]]]:
    """A statement and two pairs, one for which it is true and one for which it is false; None if none was drawn."""
    subject = generator.choice(images)
    text, rule = form(subject, generator)
    pairs = [_draw(rule, wanted, subject, images, generator) for wanted in (True, False)]
    found = [pair for pair in pairs if pair is not None]
    return (text, found) if len(found) == len(pairs) else None


def _draw(
    rule: Rule, wanted: bool, subject: SourceImage, images: Sequence[SourceImage], generator: random.Random
) -> Optional[tuple[SourceImage, SourceImage]]:
    """Two images of different units; half of the draws have the subject in them, on either side."""
    for _ in range(_TRIES):
        first, second = generator.choice(images), generator.choice(images)
        if generator.random() < 0.5:
            first = subject
        pair = (first, second) if generator.random() < 0.5 else (second, first)
        if first.unit != second.unit and rule(*pair) == wanted:
            return pair
    return None


def describe_statements(statements: Sequence[Statement]) -> dict[str, Any]:
    """Counts for the manifest; text alone is right in half of the cases, by construction."""
    return {
        "statements": len(statements),
        "images": len({path for statement in statements for path in (statement.left, statement.right)}),
        "forms": dict(sorted(Counter(statement.form for statement in statements).items())),
        "text_only_accuracy": 50.0,
    }
