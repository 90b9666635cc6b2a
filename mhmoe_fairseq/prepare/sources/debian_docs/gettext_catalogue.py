"""GNU gettext's compiled catalogues (``.mo``): pairs of an English message and its translation."""

from __future__ import annotations

import struct
from typing import Iterator, NamedTuple

from ....common.errors import UserError

_MAGICS = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}


class Message(NamedTuple):
    """A message: its context (may be empty), the English text and the translation; of plurals the last form."""

    context: str
    english: str
    translation: str


def read_catalogue(content: bytes, name: str) -> Iterator[Message]:
    """Yields the messages of one ``.mo`` file in its order, without the header.

    Args:
        name: of the file, for the error message.

    Raises:
        UserError: not such a file, or a damaged one.
    """
    try:
        order = _MAGICS[content[:4]]
        number, originals, translations = struct.unpack(f"{order}3I", content[8:20])
        for index in range(number):
            original = _text(content, order, originals + 8 * index)
            context, separator, english = original.rpartition("\x04")
            if english:
                yield Message(context, _last_form(english), _last_form(_text(content, order, translations + 8 * index)))
    except (KeyError, struct.error, UnicodeDecodeError) as error:
        raise UserError(f"{name}: not a gettext catalogue in UTF-8 ({error})") from error


def _text(content: bytes, order: str, position: int) -> str:
    length, start = struct.unpack(f"{order}2I", content[position : position + 8])
    return content[start : start + length].decode()


def _last_form(text: str) -> str:
    return text.rsplit("\0", 1)[-1]
