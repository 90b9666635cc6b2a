"""The fields of BEiT-3's index files: which ones each task has, and what a value must be."""

import json
import math
import re
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Mapping

from ...common.errors import UserError
from ..vocabulary import NUM_SPECIALS
from .columns import Builder, NumbersBuilder

_LARGEST_ID = 2**31 - 1
_HALF_PAIR = re.compile("[\ud800-\udfff]")
_NUM_CONTROLS = NUM_SPECIALS - 1  # <s>, <pad>, </s>; <unk> may be in a text


@dataclass(frozen=True)
class Field:
    """One field.

    Args:
        parse: the value as it is kept, from what JSON gives; raises ``ValueError`` with the rule.
        builder: makes its column.
        is_optional: a line may lack it.
        is_nullable: it may be null.
    """

    parse: Callable[[Any], Any]
    builder: Callable[[], Builder | NumbersBuilder]
    is_optional: bool = False
    is_nullable: bool = False


def _path(value: Any) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError("must be a relative path")
    if value.startswith("/") or ".." in value.split("/"):
        raise ValueError("must stay within the data folder: no absolute path and no '..'")
    return _encodable(value)


def _string(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("must be a text that is not empty")
    return _encodable(value)


def _encodable(value: str) -> str:
    if _HALF_PAIR.search(value):
        raise ValueError("has half a surrogate pair, which UTF-8 cannot write")
    return value


def _number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError("must be a whole number, 0 or more")
    return value


def _ids(value: Any) -> list[int]:
    if not isinstance(value, list) or not _are_within(value, {int}, _LARGEST_ID):
        raise ValueError("must be a list of ids, whole numbers of 0 or more")
    return value


def _tokens(value: Any) -> list[int]:
    if isinstance(value, list) and str in set(map(type, value)):
        raise ValueError("must be a list of token ids, not of pieces")
    if min(_ids(value), default=_NUM_CONTROLS) < _NUM_CONTROLS:
        raise ValueError("must have no <s>, <pad> or </s> (0, 1, 2): they are added when the text is read")
    return value


def _scores(value: Any) -> list[float]:
    if not isinstance(value, list) or not _are_within(value, {int, float}, 1) or any(map(math.isnan, value)):
        raise ValueError("must be a list of numbers from 0 to 1")
    return value


def _are_within(values: list[Any], kinds: set[type], most: float) -> bool:
    """Whether all are of these kinds, bool being another, and from 0 to ``most``."""
    return not values or (set(map(type, values)) <= kinds and 0 <= min(values) and max(values) <= most)


_ints, _floats, _texts = (partial(Builder, typecode) for typecode in "ifB")
_IMAGE = Field(_path, _texts)
_TEXT = Field(_tokens, _ints)
_NUMBER = Field(_number, NumbersBuilder)

FIELDS: dict[str, dict[str, Field]] = {
    "image": {"image_path": _IMAGE},
    "pair": {
        "image_path": _IMAGE,
        "text_segment": _TEXT,
        "image_id": Field(_number, NumbersBuilder, is_optional=True),
        "language": Field(_string, _texts, is_optional=True),
    },
    "vqa": {
        "image_path": _IMAGE,
        "text_segment": _TEXT,
        "labels": Field(_ids, _ints),
        "scores": Field(_scores, _floats, is_optional=True),
        "qid": _NUMBER,
    },
    "nlvr2": {
        "image_path": _IMAGE,
        "image2_path": _IMAGE,
        "text_segment": _TEXT,
        "label": Field(_number, NumbersBuilder, is_optional=True, is_nullable=True),
        "identifier": Field(_string, _texts),
    },
    "captioning": {"image_path": _IMAGE, "text_segment": Field(_tokens, _ints, is_nullable=True), "image_id": _NUMBER},
    "retrieval": {"image_path": _IMAGE, "text_segment": _TEXT, "image_id": _NUMBER},
    "imagenet": {"image_path": _IMAGE, "label": _NUMBER},
}


def parse_record(record: Any, task: str, place: str) -> dict[str, Any]:
    """The fields of one line, checked; fields that the task does not have are passed over.

    Returns:
        all the task's fields; None for one that is null or that the line lacks.

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
        raise UserError(f"{place}: field {name!r} is {_short(value)}: {error}") from error


def _short(value: Any, length: int = 80) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= length else text[: length - 3] + "..."
