"""Prose out of the dictionaries that Debian packages in dictd's format: GCIDE, WordNet and FOLDOC.

An entry is an unindented headword and an indented text; neighbouring entries of so many lines are one document, so that
no entry is divided between training and evaluation.
"""

import gzip
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from ...common.errors import UserError
from ...data.documents import Document
from ..archives import Archive, iter_deb_members
from .base import PackagedSource
from .documentation import is_prose

_LINES_PER_DOCUMENT = 100
_PRONUNCIATION = re.compile(r"\\[^\\]*\\")
_RESPELLING = re.compile(r"\s*\([^()\s]*[*\"`][^()]*\)")
_BRACKETS = re.compile(r"\[[^\[\]]*\]")
# Where an entry of GCIDE is from stands at a paragraph's end, sometimes with the next headword behind it.
_ORIGIN = re.compile(r"\[(?:1913 Webster|Webster|WordNet|PJC|RH|AS|Century|[a-z]+ ?PJC)[^\]]*\][^\[\]]*$")
_ACCENTED = re.compile(r"\[(?:(?P<before>['`^\"~])(?P<first>[a-zA-Z])|(?P<ligature>ae|oe|AE|OE))\]")
_COMBINING = {"'": "\u0301", "`": "\u0300", "^": "\u0302", '"': "\u0308", "~": "\u0303"}
_LIGATURES = {"ae": "æ", "oe": "œ", "AE": "Æ", "OE": "Œ"}
_NUMBER = re.compile(r"^(?:\d{1,2}|\([a-z]\))\.?\s+")
_SPACED = re.compile(r"\s+([,.;:!?)])")
_LABEL = re.compile(r"^<[^<>]*>\s*")
_SENSE = re.compile(r"^\s+(?:(?:n|v|adj|adv|r|s|a) )?(?:\d+: )", re.MULTILINE)
_RELATED = re.compile(r"\[(?:syn|ant|also|sim)[^\]]*\]")
_MIN_GLOSS_WORDS = 4


def dictionary_documents(read: Callable[[str], Iterator[list[str]]], path: Path) -> Iterator[Document]:
    """Yields the entries that ``read`` makes of a dictd database's text, each a list of lines, in documents of many."""
    found = [content for _, content in iter_deb_members(path, lambda name: name.endswith(".dict.dz"))]
    if len(found) != 1:
        raise UserError(f"{path}: has {len(found)} dictionaries (*.dict.dz), one was expected; delete it and run again")
    try:
        text = gzip.decompress(found[0]).decode("utf-8", "replace")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged dictionary ({error}); delete it and run again") from error
    yield from _grouped(read(text))


def _grouped(entries_lines: Iterable[list[str]]) -> Iterator[Document]:
    kept: list[str] = []
    number = 0
    for lines in entries_lines:
        kept += lines
        if len(kept) >= _LINES_PER_DOCUMENT:
            yield Document(f"entries {number}", kept)
            kept, number = [], number + 1
    if kept:
        yield Document(f"entries {number}", kept)


def entries(text: str) -> Iterator[tuple[str, str]]:
    """Yields the first line and the indented rest of every entry, without the database's description."""
    headword = ""
    body: list[str] = []
    for line in [*text.splitlines(), "end"]:
        if line[:1].strip():
            if headword and not headword.startswith("00-database"):
                yield headword, "\n".join(body)
            headword, body = line.strip(), []
        else:
            body.append(line)


def gcide_lines(text: str) -> Iterator[list[str]]:
    """Yields each entry's definitions, notes and quotations, without pronunciation, etymology and origin.

    What GCIDE took from WordNet, whose glosses are a domain of their own, is left out: everything of an entry between
    the origin before and an origin that names WordNet.
    """
    for headword, body in entries(text):
        kept: list[str] = []
        since_origin: list[str] = []
        for paragraph in re.split(r"\n\s*\n", f"{headword}\n{body}"):
            if "WordNet" in paragraph:
                since_origin.clear()
                continue
            since_origin.append(_gcide_line(paragraph))
            if _ORIGIN.search(paragraph):
                kept += since_origin
                since_origin.clear()
        yield [line for line in kept + since_origin if is_prose(line) and "\\" not in line]


def _gcide_line(paragraph: str) -> str:
    line = _ACCENTED.sub(_letter, _ORIGIN.sub("", _PRONUNCIATION.sub("", paragraph)))
    while (shorter := _BRACKETS.sub("", line)) != line:
        line = shorter
    line = _SPACED.sub(r"\1", " ".join(line.replace("{", "").replace("}", "").split()))
    return _RESPELLING.sub("", _NUMBER.sub("", line)).replace(",,", ",")


def _letter(found: re.Match[str]) -> str:
    return _LIGATURES.get(found["ligature"]) or found["first"] + _COMBINING[found["before"]]


def foldoc_lines(text: str) -> Iterator[list[str]]:
    """Yields each entry's paragraphs that read like sentences; its first begins with its headword."""
    for headword, body in entries(text):
        lines: list[str] = []
        for index, paragraph in enumerate(filter(None, map(str.strip, re.split(r"\n\s*\n", body)))):
            line = _LABEL.sub("", _NUMBER.sub("", " ".join(paragraph.split())))
            line = _BRACKETS.sub("", line.replace("{", "").replace("}", ""))
            line = _SPACED.sub(r"\1", " ".join(line.split()))
            if is_prose(line):
                lines.append(line if index else f"{headword.split('%%%')[0]}: {line}")
        yield lines


def wordnet_lines(text: str) -> Iterator[list[str]]:
    """Yields each word's glosses and examples; a gloss stands behind the first word that has it."""
    seen: set[str] = set()
    for headword, body in entries(text):
        glosses = dict.fromkeys(" ".join(_RELATED.sub("", sense).split()) for sense in _SENSE.split(body)[1:])
        new = [gloss for gloss in glosses if len(gloss.split()) >= _MIN_GLOSS_WORDS and gloss not in seen]
        seen.update(new)
        yield [f"{headword}: {gloss}" for gloss in new]


def _dictionary(package: str, licence: str, read: Callable[[str], Iterator[list[str]]]) -> PackagedSource:
    return PackagedSource(
        name=package,
        licence=licence,
        unit=f"document = neighbouring entries of {_LINES_PER_DOCUMENT} lines, line = paragraph or sense",
        archive=Archive("apt-get", package, None, f"{package}_*.deb"),
        read=partial(dictionary_documents, read),
    )


GCIDE = _dictionary("dict-gcide", "GPL-2+", gcide_lines)
FOLDOC = _dictionary("dict-foldoc", "GFDL-1.1+", foldoc_lines)
WORDNET = _dictionary("dict-wn", "WordNet 3.0 licence", wordnet_lines)
