"""Classes: their names in the order of their ids, and the spellings that stand for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable, Optional, Sequence

from ...errors import UserError
from .examples import Example

_RESERVED = ("<s>", "<pad>", "</s>", "<unk>")  # every fairseq dictionary has them, and madeupword0000


@dataclass(frozen=True)
class Labels:
    """The classes of a task.

    Args:
        spellings: for each class its name and other spellings of it.
        skipped: labels whose examples are left out, such as MNLI's ``-``.
        field: the label's field, for messages.
    """

    spellings: tuple[tuple[str, ...], ...]
    skipped: frozenset[str] = frozenset()
    field: str = "label"

    @property
    def names(self) -> list[str]:
        """The names, by id."""
        return [spellings[0] for spellings in self.spellings]

    def find(self, example: Example) -> Optional[int]:
        """The id of an example's class; None if it is to be left out.

        Where no class is called by a number, a number is an id, as in data sets that store ids.

        Raises:
            UserError: naming file, line, field and label.
        """
        label = example.label
        if label in self.skipped:
            return None
        for index, spellings in enumerate(self.spellings):
            if label in spellings:
                return index
        if label.isdecimal() and int(label) < len(self.names) and not any(map(str.isdecimal, self.names)):
            return int(label)
        raise UserError(f"{example.place}: field {self.field!r} is {label!r}, must be one of {', '.join(self.names)}")


def given_labels(words: Sequence[str], skipped: Iterable[str], field: str) -> Labels:
    """Labels from ``--labels``: ``entailment neutral contradiction=contradictory``.

    Raises:
        UserError: fewer than two classes, an empty name, or one that occurs twice.
    """
    labels = Labels(tuple(tuple(word.split("=")) for word in words), frozenset(skipped), field)
    _check(labels)
    return labels


def found_labels(examples: Iterable[Example], skipped: Iterable[str], field: str) -> Labels:
    """Labels from the training examples: all that occur, numbers in their order, words in the alphabet's.

    Raises:
        UserError: fewer than two.
    """
    left_out = frozenset(skipped)
    found = {example.label for example in examples} - left_out
    numeric = all(label.isdecimal() for label in found)
    ordered = sorted(found, key=int) if numeric else sorted(found)
    labels = Labels(tuple((label,) for label in ordered), left_out, field)
    _check(labels)
    return labels


def _check(labels: Labels) -> None:
    every = [spelling for spellings in labels.spellings for spelling in spellings]
    if len(labels.spellings) < 2:
        raise UserError(
            f"--labels: needs at least two classes, not {', '.join(every) or 'none'} (field {labels.field!r})"
        )
    for spelling in every:
        if not spelling or spelling in _RESERVED or spelling.startswith("madeupword"):
            raise UserError(f"--labels: {spelling!r} is no name of a class")
        if every.count(spelling) > 1 or spelling in labels.skipped:
            raise UserError(f"--labels: {spelling!r} stands for two things")
