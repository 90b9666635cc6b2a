"""Passages: the pieces of text that the sources of many languages yield, and their files between two stages."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple, Optional

from ...common.files import atomic_open


class Passage(NamedTuple):
    """A few lines of text in one language.

    Args:
        document: passages of one document stand together, one after the other.
        unit: what is held out together, named alike in all languages: a page, a dialogue, a message.
        lines: the text.
        key: names the same text in all languages; None where the source does not say what translates what.
    """

    document: str
    unit: str
    lines: list[str]
    key: Optional[str] = None


@contextlib.contextmanager
def open_passages(path: Path) -> Iterator[Callable[[Passage], None]]:
    """A function that writes a passage, as one JSON list a line, to ``path``, which appears at the end."""
    with atomic_open(path) as stream:

        def write(passage: Passage) -> None:
            # half a surrogate pair cannot be written in UTF-8
            stream.write((json.dumps(passage, ensure_ascii=False) + "\n").encode("utf-8", "replace"))

        yield write


def write_passages(passages: Iterable[Passage], path: Path) -> None:
    """Writes all of ``passages`` to ``path``, atomically."""
    with open_passages(path) as write:
        for passage in passages:
            write(passage)


def read_passages(path: Path) -> Iterator[Passage]:
    """What :func:`write_passages` wrote, in order."""
    with open(path, encoding="utf-8", newline="\n") as stream:
        for line in stream:
            yield Passage(*json.loads(line))
