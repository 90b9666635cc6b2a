"""Classes: their names in the order of their ids, and the spellings that stand for each."""

import re
from dataclasses import dataclass
from typing import Iterable, Mapping, Optional, Sequence

from ...common.errors import UserError
from .examples import Example

_NUMBER = re.compile(r"-?\d+")
_RESERVED = ("<s>", "<pad>", "</s>", "<unk>")  # every fairseq dictionary has them, and madeupword0000


@dataclass(frozen=True)
class Labels:
    """The classes of a task.

    Args:
        spellings: for each class its name and other spellings of it.
        skipped: labels whose examples are left out, such as MNLI's ``-``.
        field: the label's field, for messages.
        are_ordered: whether somebody has said in which order the classes stand, so that a number can be an id.
    """

    spellings: tuple[tuple[str, ...], ...]
    skipped: frozenset[str] = frozenset()
    field: str = "label"
    are_ordered: bool = True

    @property
    def names(self) -> list[str]:
        """The names, by id."""
        return [spellings[0] for spellings in self.spellings]

    def find(self, example: Example) -> Optional[int]:
        """The id of an example's class; None if it is to be left out.

        Where no class is called by a number and the order of the classes was given, a number is an id, as in data sets
        that store ids. An order that was only found, such as the alphabet's, says nothing about ids.

        Raises:
            UserError: naming file, line, field and label.
        """
        label = example.label
        if label in self.skipped:
            return None
        for index, spellings in enumerate(self.spellings):
            if label in spellings:
                return index
        if _is_number(label) and not any(map(_is_number, self.names)):
            if not self.are_ordered:
                raise UserError(
                    f"{example.place}: field {self.field!r} is {label!r}, a number, and the classes are names "
                    f"({', '.join(self.names)}) without ids: give mhmoe prepare classification --labels, the names in "
                    "the order of the ids"
                )
            if 0 <= int(label) < len(self.names):
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
        UserError: fewer than two; or what may be two codings of one class: numbers beside words, or words that differ
            in case only.
    """
    left_out = frozenset(skipped)
    places: dict[str, str] = {}
    for example in examples:
        if example.label not in left_out:
            places.setdefault(example.label, example.place)
    numeric = all(map(_is_number, places))
    ordered = sorted(places, key=int) if numeric else sorted(places)
    _refuse_two_codings(places, field)
    labels = Labels(tuple((label,) for label in ordered), left_out, field, are_ordered=False)
    _check(labels)
    return labels


def _is_number(label: str) -> bool:
    return _NUMBER.fullmatch(label) is not None


def _refuse_two_codings(places: Mapping[str, str], field: str) -> None:
    """``UserError`` if two of the labels, each with the place of its first example, may be spellings of one class."""
    numbers = [label for label in places if _is_number(label)]
    words = [label for label in places if not _is_number(label)]
    suspects = [(number, word, "are a number and a word") for number, word in zip(numbers, words)]
    spelt: dict[str, str] = {}
    for word in words:
        if (other := spelt.setdefault(word.casefold(), word)) != word:
            suspects.append((other, word, "differ in case only"))
    for one, other, how in suspects:
        raise UserError(
            f"--labels: needed, since {places[one]} has {one!r} in {field!r} and {places[other]} has {other!r}, which "
            f"{how} and may stand for one class: give the names in the order of the ids, each with its =OTHER spellings"
        )


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
