"""Telling prose from markup: what kernel documentation and docstrings have in common."""

import re
from typing import Iterator

_ROLE = re.compile(r":[\w+.:-]+:`~?([^`<]*?)(?:\s*<[^`]*>)?`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]*>`__?")
_QUOTES = re.compile(r"`{1,2}([^`]+)`{1,2}_{0,2}")
_EMPHASIS = re.compile(r"(?<!\w)(\*{1,2})(?=\S)([^*]+?)(?<=\S)\1(?!\w)")
_UNDERLINE = re.compile(r"^\s*([=\-~^\"'#*+.:_`])\1{2,}\s*$")
_BULLET = re.compile(r"^\s*(?:[-*+•]|\(?\d{1,2}[.)]|\(?[a-z][.)])\s+")
_FIELD = re.compile(r"^\s*:[\w .-]+:(?:\s+|$)")
_CODE = re.compile(r"[{};]\s*$|==|->|=>|::|&&|<<|>>|\\\w|[|$#@^~{}]")
_MIN_WORDS = 8
_MIN_LETTERS = 0.85


def strip_inline_markup(text: str) -> str:
    """Replaces reStructuredText roles, links, literals and emphasis by their text."""
    text = _LINK.sub(r"\1", _ROLE.sub(r"\1", text))
    return _EMPHASIS.sub(r"\2", _QUOTES.sub(r"\1", text)).replace("::", ":")


def paragraphs(text: str) -> Iterator[str]:
    """Yields the paragraphs of reStructuredText: no directives, literal blocks, tables, comments or headings.

    A bullet starts a new paragraph. Lines are joined; markup inside them is removed.
    """
    block: list[str] = []
    skip_deeper_than: int | None = None
    for line in [*text.expandtabs().splitlines(), ""]:
        indent = len(line) - len(line.lstrip())
        if line.strip() and skip_deeper_than is not None:
            if indent > skip_deeper_than:
                continue
            skip_deeper_than = None
        starts_item = bool(_BULLET.match(line) or _FIELD.match(line))
        if (not line.strip() or starts_item) and block:
            if block[-1].rstrip().endswith("::"):
                skip_deeper_than = _indent(block)
            yield _join(block)
            block = []
        if not line.strip():
            continue
        if line.lstrip().startswith(".. ") or line.strip() == "..":
            skip_deeper_than = indent
        elif _UNDERLINE.match(line):
            block = []  # the line above was a heading
        else:
            block.append(_FIELD.sub("", _BULLET.sub("", line)) if starts_item else line)


def prose_lines(text: str) -> list[str]:
    """Returns the paragraphs of reStructuredText that read like sentences."""
    return [paragraph for paragraph in paragraphs(text) if is_prose(paragraph)]


def _indent(block: list[str]) -> int:
    return min(len(line) - len(line.lstrip()) for line in block)


def _join(block: list[str]) -> str:
    return " ".join(strip_inline_markup(" ".join(block)).split())


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads like sentences: enough words, mostly letters, an end mark, no signs of code."""
    if len(paragraph.split()) < _MIN_WORDS or not re.search(r"[.!?:](\s|\)|\"|$)", paragraph):
        return False
    letters = sum(character.isalpha() or character.isspace() for character in paragraph)
    return letters >= _MIN_LETTERS * len(paragraph) and not _CODE.search(paragraph)
