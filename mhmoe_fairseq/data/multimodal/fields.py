"""The fields of BEiT-3's index files: which ones each task has, what a value must be, and the column that keeps it.

A list of Python objects takes some hundred bytes for each row and is copied page by page into every worker of the data
loader, whose reading alone changes reference counts. Arrays take the bytes of the values and stay shared.
"""

import json
import math
import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...common.errors import UserError
from ..vocabularies import NUM_SPECIALS

MISSING = -1  # a number that a row does not have
_LARGEST_ID = 2**31 - 1
_SHOWN = 80  # characters of a value in a message
_HALF_PAIR = re.compile("[\ud800-\udfff]")
_NUM_CONTROLS = NUM_SPECIALS - 1  # <s>, <pad>, </s>; <unk> may be in a text


class Lists:
    """Lists of numbers in one array; a list may be null, which is another thing than empty."""

    def __init__(self, values: np.ndarray, offsets: np.ndarray, null_rows: np.ndarray) -> None:
        self.values, self._offsets, self.null_rows = values, offsets, null_rows

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> Any:
        """Return the row's numbers, ``(length,)``; none for a null list."""
        return self.values[self._offsets[row] : self._offsets[row + 1]]

    def row_of(self, position: int) -> int:
        """Return the row whose list has the number at a position of ``values``."""
        return int(np.searchsorted(self._offsets, position, side="right")) - 1

    @property
    def lengths(self) -> np.ndarray:
        """``(rows,)`` numbers in each list; 0 for a null one."""
        return np.diff(self._offsets)


class Strings(Lists):
    """Strings as one block of UTF-8; a null one is empty."""

    def __getitem__(self, row: int) -> str:
        return super().__getitem__(row).tobytes().decode()


class Builder:
    """Takes the values of a column one by one.

    Args:
        typecode: ``i`` for lists of ids, ``f`` for lists of scores, ``B`` for strings, ``q`` for numbers.
    """

    def __init__(self, typecode: str) -> None:
        self._values: array[float] = array(typecode)
        self._offsets, self._null_rows = array("q", [0]), array("q")

    def append(self, value: Sequence[float] | str | int | None) -> None:
        """Add a row; None becomes ``MISSING``, a null list, or the empty string."""
        if value is None and self._values.typecode == "q":
            value = MISSING
        if isinstance(value, int):
            self._values.append(value)
            return
        if value is None:
            self._null_rows.append(len(self._offsets) - 1)
        self._values.extend(value.encode() if isinstance(value, str) else value or ())
        self._offsets.append(len(self._values))

    def finish(self) -> Lists | np.ndarray:
        """Return the column: numbers as an array of int64."""
        if self._values.typecode == "q":
            return np.array(self._values)
        kind = Strings if self._values.typecode == "B" else Lists
        return kind(*map(np.array, (self._values, self._offsets, self._null_rows)))


@dataclass(frozen=True)
class Field:
    """A field of a task's lines.

    Args:
        parse: makes the value that is kept out of what JSON gives; raises ``ValueError`` with the rule.
        typecode: of its column, see ``Builder``.
        is_optional: a line may lack it.
        is_nullable: it may be null.
    """

    parse: Callable[[Any], Any]
    typecode: str
    is_optional: bool = False
    is_nullable: bool = False


def _require(is_met: object, rule: str) -> None:
    if not is_met:
        raise ValueError(rule)


def _path(value: Any) -> str:
    _require(isinstance(value, str) and value and "\0" not in value, "must be a relative path")
    is_within = not value.startswith("/") and ".." not in value.split("/")
    _require(is_within, "must stay within the data folder: no absolute path and no '..'")
    return _string(value)


def _string(value: Any) -> str:
    _require(isinstance(value, str) and value, "must be a text that is not empty")
    _require(not _HALF_PAIR.search(value), "has half a surrogate pair, which UTF-8 cannot write")
    return value


def _number(value: Any) -> int:
    _require(type(value) is int and 0 <= value < 2**63, "must be a whole number, 0 or more")
    return value


def _ids(value: Any) -> list[int]:
    _require(_are_within(value, {int}, _LARGEST_ID), "must be a list of ids, whole numbers of 0 or more")
    return value


def _tokens(value: Any) -> list[int]:
    are_pieces = isinstance(value, list) and str in set(map(type, value))
    _require(not are_pieces, "must be a list of token ids, not of pieces")
    has_controls = min(_ids(value), default=_NUM_CONTROLS) < _NUM_CONTROLS
    _require(not has_controls, "must have no <s>, <pad> or </s> (0, 1, 2): they are added when the text is read")
    return value


def _scores(value: Any) -> list[float]:
    are_scores = _are_within(value, {int, float}, 1) and not any(map(math.isnan, value))
    _require(are_scores, "must be a list of numbers from 0 to 1")
    return value


def _are_within(values: Any, kinds: set[type], most: float) -> bool:
    """Whether it is a list of these kinds, bool being another, and all are from 0 to ``most``."""
    if not isinstance(values, list) or not set(map(type, values)) <= kinds:
        return False
    return not values or (0 <= min(values) and max(values) <= most)


_IMAGE = Field(_path, "B")
_TEXT = Field(_tokens, "i")
_NUMBER = Field(_number, "q")

FIELDS: dict[str, dict[str, Field]] = {
    "image": {"image_path": _IMAGE},
    "pair": {
        "image_path": _IMAGE,
        "text_segment": _TEXT,
        "image_id": Field(_number, "q", is_optional=True),
        "language": Field(_string, "B", is_optional=True),
    },
    "vqa": {
        "image_path": _IMAGE,
        "text_segment": _TEXT,
        "labels": Field(_ids, "i"),
        "scores": Field(_scores, "f", is_optional=True),
        "qid": _NUMBER,
    },
    "nlvr2": {
        "image_path": _IMAGE,
        "image2_path": _IMAGE,
        "text_segment": _TEXT,
        "label": Field(_number, "q", is_optional=True, is_nullable=True),
        "identifier": Field(_string, "B"),
    },
    "captioning": {"image_path": _IMAGE, "text_segment": Field(_tokens, "i", is_nullable=True), "image_id": _NUMBER},
    "retrieval": {"image_path": _IMAGE, "text_segment": _TEXT, "image_id": _NUMBER},
    "imagenet": {"image_path": _IMAGE, "label": _NUMBER},
}


def parse_record(record: Any, task: str, place: str) -> dict[str, Any]:
    """Return a line's fields, checked: all that the task has and no other, None for what is null or not there.

    Raises:
        UserError: naming ``place``, the field, its value and the rule.
    """
    if not isinstance(record, Mapping):
        raise UserError(f"{place}: needs a JSON object")
    values = {name: _value(record, name, field, place) for name, field in FIELDS[task].items()}
    if task == "vqa" and len(values["labels"]) != len(values["scores"] or ()):
        raise UserError(
            f"{place}: {len(values['labels'])} labels and {len(values['scores'] or ())} scores, must be as many"
        )
    if task == "nlvr2" and values["label"] not in (0, 1, None):
        raise UserError(f"{place}: field 'label' is {values['label']}, must be 0 or 1")
    return values


def _value(record: Mapping[str, Any], name: str, field: Field, place: str) -> Any:
    if name not in record:
        if field.is_optional:
            return None
        raise UserError(f"{place}: no field {name!r}; it has {', '.join(map(str, record)) or 'none'}")
    value = record[name]
    if value is None and field.is_nullable:
        return None
    try:
        return field.parse(value)
    except ValueError as error:
        shown = json.dumps(value, default=str)
        shown = shown if len(shown) <= _SHOWN else shown[: _SHOWN - 3] + "..."
        raise UserError(f"{place}: field {name!r} is {shown}: {error}") from error
