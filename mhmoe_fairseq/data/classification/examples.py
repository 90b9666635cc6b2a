"""Examples out of JSON lines and TSV files: named fields with one or two texts, and a field with the label."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Optional, Sequence

from ...common.errors import UserError
from ...common.files import read_json_lines, read_utf8_lines
from ..documents import clean_line
from ..languages import language_of

_FORMATS = {".jsonl": "JSON lines", ".json": "JSON lines", ".tsv": "TSV"}


class Example(NamedTuple):
    """One example: its place as ``file:line``, its clean texts, and its label as the file spells it."""

    place: str
    texts: tuple[str, ...]
    label: str


@dataclass(frozen=True)
class Fields:
    """Names of the fields.

    Args:
        texts: of one sentence, or of the first and the second of a pair.
        label: of the label; None where there is none to read.
        language: of the language's code, where one file holds several; None where it does not.
    """

    texts: tuple[str, ...]
    label: Optional[str] = "label"
    language: Optional[str] = None


def read_examples(
    path: Path, fields: Fields, code: str = "", *, is_shared: bool = False, others: Optional[Counter[str]] = None
) -> Iterator[Example]:
    """The examples of a ``.jsonl`` or ``.tsv`` file (``.gz`` too), in order; empty lines are passed over.

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
    rows = _jsonl_rows(path) if file_format(path) == "JSON lines" else _tsv_rows(path, needed)
    for place, row in rows:
        if fields.language is not None and (is_shared or fields.language in row):
            tag = _value(row, fields.language, place)
            if language_of(tag) != code:
                if others is not None:
                    others[tag] += 1
                continue
        texts = tuple(_text(row, name, place) for name in fields.texts)
        yield Example(place, texts, "" if fields.label is None else _value(row, fields.label, place))


def file_format(path: Path) -> str:
    """``JSON lines`` or ``TSV``, by the name; ``UserError`` for another one."""
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix not in _FORMATS:
        raise UserError(f"{path}: must end in {', '.join(_FORMATS)} (or one of them and .gz)")
    return _FORMATS[suffix]


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, row in read_json_lines(path):
        if not isinstance(row, dict):
            raise UserError(f"{place}: needs a JSON object")
        yield place, row


def _tsv_rows(path: Path, needed: Sequence[Optional[str]]) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = enumerate(read_utf8_lines(path), start=1)
    _, first = next(lines, (0, ""))
    header = first.split("\t")
    for name in needed:
        if name is not None and name not in header:
            raise UserError(f"{path}:1: no field {name!r}; the first line names {', '.join(header)}")
    for number, line in lines:
        if not line.strip():
            continue
        values = line.split("\t")
        if len(values) != len(header):
            raise UserError(f"{path}:{number}: {len(values)} fields, but the first line names {len(header)}")
        yield f"{path}:{number}", dict(zip(header, values))


def _value(row: dict[str, Any], name: str, place: str) -> str:
    """A field that is a string or a whole number, as a string."""
    if name not in row:
        raise UserError(f"{place}: no field {name!r}; it has {', '.join(row) or 'none'}")
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise UserError(f"{place}: field {name!r} is {json.dumps(value)}, must be a string or a whole number")
    return str(value).strip()


def _text(row: dict[str, Any], name: str, place: str) -> str:
    if name not in row:
        raise UserError(f"{place}: no field {name!r}; it has {', '.join(row) or 'none'}")
    value = row[name]
    if not isinstance(value, str):
        raise UserError(f"{place}: field {name!r} is {json.dumps(value)}, must be a text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(f"{place}: field {name!r} has half a surrogate pair, which UTF-8 cannot write")
    text = clean_line(value)
    if not text:
        raise UserError(f"{place}: field {name!r} has no text")
    return text
