"""True and false statements about two pictures, from their metadata: derived data, not NLVR2.

Every statement is used once where it is true and once where it is false, so that its words tell nothing.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any, Callable, NamedTuple, Optional, Sequence

from .pictures import Picture

Rule = Callable[[Picture, Picture], bool]
Form = Callable[[Picture, random.Random], tuple[str, Rule]]
_TRIES = 200


class Statement(NamedTuple):
    """A statement about a left and a right picture, and whether it is true of them."""

    left: str
    right: str
    form: str
    text: str
    is_true: bool
    identifier: str


def derive_statements(pictures: Sequence[Picture], count: int, seed: int, key: str) -> list[Statement]:
    """``count`` statements (rounded down to whole pairs) about pairs of the pictures of one part.

    Args:
        pictures: of one part; those without a kind are left out.
        seed: decides everything that is drawn.
        key: of the part; it begins the identifiers.

    Returns:
        nothing when the pictures are of fewer than three kinds: then most statements have no false case.
    """
    generator = random.Random(f"{seed} {key}")
    shown = sorted((picture for picture in pictures if picture.group), key=lambda picture: picture.path)
    if len({picture.group for picture in shown}) < 3:
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
            left, right = (picture.path for picture in pair)
            made.append(Statement(left, right, form, text, is_true, f"{key}-{number}-{place}-0"))
    generator.shuffle(made)
    return made


def _both(picture: Picture, generator: random.Random) -> tuple[str, Rule]:
    group = picture.group
    return f"both pictures are of the kind {group}", lambda left, right: left.group == right.group == group


def _exactly_one(picture: Picture, generator: random.Random) -> tuple[str, Rule]:
    group = picture.group
    return (
        f"exactly one picture is of the kind {group}",
        lambda left, right: (left.group == group) != (right.group == group),
    )


def _none(picture: Picture, generator: random.Random) -> tuple[str, Rule]:
    group = picture.group
    return f"no picture is of the kind {group}", lambda left, right: group not in (left.group, right.group)


def _left(picture: Picture, generator: random.Random) -> tuple[str, Rule]:
    group = picture.group
    return (
        f"only the left picture is of the kind {group}",
        lambda left, right: left.group == group and right.group != group,
    )


def _same(picture: Picture, generator: random.Random) -> tuple[str, Rule]:
    return "both pictures are of the same kind", lambda left, right: left.group == right.group


def _word(picture: Picture, generator: random.Random) -> tuple[str, Rule]:
    word = generator.choice(picture.keywords or (picture.group,))
    return f"the word {word} fits one of the pictures", lambda left, right: any(
        word in (*shown.keywords, shown.group) for shown in (left, right)
    )


_FORMS: dict[str, Form] = {
    "both": _both, "exactly one": _exactly_one, "none": _none, "only left": _left, "same": _same, "word": _word,
}  # fmt: skip


def _make(
    form: Form, pictures: Sequence[Picture], generator: random.Random
) -> Optional[tuple[str, list[tuple[Picture, Picture]]]]:
    """A statement and two pairs, one for which it is true and one for which it is false; None if none was drawn."""
    subject = generator.choice(pictures)
    text, rule = form(subject, generator)
    pairs = [_draw(rule, wanted, subject, pictures, generator) for wanted in (True, False)]
    found = [pair for pair in pairs if pair is not None]
    return (text, found) if len(found) == len(pairs) else None


def _draw(
    rule: Rule, wanted: bool, subject: Picture, pictures: Sequence[Picture], generator: random.Random
) -> Optional[tuple[Picture, Picture]]:
    """Two pictures of different units; half of the draws have the subject in them, on either side."""
    for _ in range(_TRIES):
        first, second = generator.choice(pictures), generator.choice(pictures)
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
        "pictures": len({path for statement in statements for path in (statement.left, statement.right)}),
        "forms": dict(sorted(Counter(statement.form for statement in statements).items())),
        "text_only_accuracy": 50.0,
    }
