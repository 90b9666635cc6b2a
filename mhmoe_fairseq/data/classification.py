"""Labelled sentences and pairs, such as XNLI's, out of JSON lines and TSV files, and the classes of their labels."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple

from ..common.errors import UserError
from ..common.files import read_json_lines, read_utf8_lines
from .documents import clean_line
from .languages import language_of

_FORMATS = {".jsonl": "JSON lines", ".json": "JSON lines", ".tsv": "TSV"}
_NUMBER = re.compile(r"-?\d+")
_RESERVED = ("<s>", "<pad>", "</s>", "<unk>")  # every fairseq dictionary has them, and madeupword0000


class Example(NamedTuple):
    """An example: its place as ``file:line``, its clean texts, and its label as the file spells it."""

    place: str
    texts: tuple[str, ...]
    label: str


@dataclass(frozen=True)
class Fields:
    """Names of the fields.

    Args:
        texts: the sentence's, or those of a pair.
        label: None where there is none to read.
        language: the code's, where one file holds several languages.
    """

    texts: tuple[str, ...]
    label: str | None = "label"
    language: str | None = None


def read_examples(
    path: Path, fields: Fields, code: str = "", *, is_shared: bool = False, others: Counter[str] | None = None
) -> Iterator[Example]:
    """Yield the examples of a ``.jsonl`` or ``.tsv`` file (``.gz`` too), in order; empty lines are passed over.

    A TSV file has the names of its fields in the first line, and no quoting.

    Args:
        code: with a language field, examples of other languages are passed over; ``zh-Hans`` and the like are ``zh``.
        is_shared: the file is read for several languages, so every example must have the language field; otherwise
            those without it are of this language.
        others: counts the examples that are passed over, by language as the file spells it.

    Raises:
        UserError: naming file, line and field.
    """
    needed = [*fields.texts, fields.label, fields.language if is_shared else None]
    rows = read_json_lines(path) if file_format(path) == "JSON lines" else _tsv_rows(path, needed)
    for place, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{place}: needs a JSON object")
        if fields.language is not None and (is_shared or fields.language in row):
            tag = _word(row, fields.language, place)
            if language_of(tag) != code:
                if others is not None:
                    others[tag] += 1
                continue
        texts = tuple(_text(row, name, place) for name in fields.texts)
        yield Example(place, texts, "" if fields.label is None else _word(row, fields.label, place))


def file_format(path: Path) -> str:
    """Return ``JSON lines`` or ``TSV``, by the name; ``UserError`` for another one."""
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix not in _FORMATS:
        raise UserError(f"{path}: must end in {', '.join(_FORMATS)} (or one of them and .gz)")
    return _FORMATS[suffix]


def _tsv_rows(path: Path, needed: Sequence[str | None]) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = read_utf8_lines(path)
    header = next(lines, "").split("\t")
    for name in needed:
        if name is not None and name not in header:
            raise UserError(f"{path}:1: no field {name!r}; the first line names {', '.join(header)}")
    for number, line in enumerate(lines, start=2):
        if not line.strip():
            continue
        values = line.split("\t")
        if len(values) != len(header):
            raise UserError(f"{path}:{number}: {len(values)} fields, but the first line names {len(header)}")
        yield f"{path}:{number}", dict(zip(header, values))


def _value(row: dict[str, Any], name: str, place: str, kinds: type | UnionType, rule: str) -> Any:
    if name not in row:
        raise UserError(f"{place}: no field {name!r}; it has {', '.join(row) or 'none'}")
    if isinstance(row[name], bool) or not isinstance(row[name], kinds):
        raise UserError(f"{place}: field {name!r} is {json.dumps(row[name])}, must be {rule}")
    return row[name]


def _word(row: dict[str, Any], name: str, place: str) -> str:
    """A field that is a string or a whole number, as a string."""
    return str(_value(row, name, place, str | int, "a string or a whole number")).strip()


def _text(row: dict[str, Any], name: str, place: str) -> str:
    value = _value(row, name, place, str, "a text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(f"{place}: field {name!r} has half a surrogate pair, which UTF-8 cannot write")
    text = clean_line(value)
    if not text:
        raise UserError(f"{place}: field {name!r} has no text")
    return text


@dataclass(frozen=True)
class Labels:
    """The classes of a task: their names in the order of their ids, and the spellings that stand for each.

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

    def find(self, example: Example) -> int | None:
        """Return the id of an example's class; None if it is to be left out.

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
    """Return the labels of ``--labels``: ``entailment neutral contradiction=contradictory``.

    Raises:
        UserError: fewer than two classes, an empty name, or one that occurs twice.
    """
    return _checked(Labels(tuple(tuple(word.split("=")) for word in words), frozenset(skipped), field))


def found_labels(examples: Iterable[Example], skipped: Iterable[str], field: str) -> Labels:
    """Return the labels of the training examples: all that occur, numbers in their order, words in the alphabet's.

    Raises:
        UserError: fewer than two; or what may be two codings of one class: numbers beside words, or words that differ
            in case only.
    """
    left_out = frozenset(skipped)
    places: dict[str, str] = {}
    for example in examples:
        if example.label not in left_out:
            places.setdefault(example.label, example.place)
    _refuse_two_codings(places, field)
    ordered = sorted(places, key=int if all(map(_is_number, places)) else str)
    return _checked(Labels(tuple((label,) for label in ordered), left_out, field, are_ordered=False))


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
    for label, other, how in suspects:
        raise UserError(
            f"--labels: needed, since {places[label]} has {label!r} in {field!r} and {places[other]} has {other!r}, "
            f"which {how} and may stand for one class: give the names in the order of the ids, each with its "
            "=OTHER spellings"
        )


def _checked(labels: Labels) -> Labels:
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
    return labels
