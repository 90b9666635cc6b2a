"""Text out of what Debian's documentation is written in: HTML, Mallard, messages of programs, wiki text."""

from __future__ import annotations

import html
import re
from typing import Iterator, NamedTuple

# Blocks end a line; Mallard's are among them. What is inside the skipped elements is no prose of the page.
_BLOCK = re.compile(
    r"<(?P<close>/?)(?:p|div|li|dd|dt|dl|td|th|tr|h[1-6]|br|hr|table|tbody|thead|ul|ol|section|body|html|page|info"
    r"|item|title|subtitle|desc|note|steps|list|terms|tree|figure|media|caption|blockquote)\b(?P<attributes>[^>]*)>",
    re.IGNORECASE,
)
_SKIPPED = re.compile(
    r"<(script|style|head|pre|nav|screen|synopsis|credit|(?:\w+:)?credit|revision|license|comment)\b[^>]*(?<!/)>"
    r".*?</\1>|<!--.*?-->|<ul class=\"docnav\">.*?</ul>",
    re.IGNORECASE | re.DOTALL,
)
_TAG = re.compile(r"</?[A-Za-z!?][^<>]*>")
_ID = re.compile(r"""\bid\s*=\s*["']([^"']*)["']""")

_BRACES = re.compile(r"\{\{([^{}]*)\}\}")
_WIKI_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_WEB_LINK = re.compile(r"\[(?:https?:)?//\S+\s+([^\]]*)\]|\[\$\d+\s+([^\]]*)\]")
_WIKI_QUOTES = re.compile(r"'{2,5}")
_WIKI_START = re.compile(r"^\s*(?:[*#:;]+|=+)\s*|\s*=+\s*$")
# $1, ${name}, $(ARG1), %s, %1$s, %d, %1, {0}: what a program puts in later.
_PLACEHOLDER = re.compile(r"\$\{\w+\}|\$\(\w+\)|\$\w+|%(?:\d+\$)?[sdiuxf]\b|%[1-9]\b|\{\w*\}|#\w+#|%[A-Z_]{3,}%?")
_CJK_ACCELERATOR = re.compile(r"\s*\([_~&]\w\)")
_ACCELERATORS = ("_", "~", "&")


class Block(NamedTuple):
    """One paragraph, heading, list item or cell: its ``id`` attribute (may be empty) and its text in one line."""

    id: str
    text: str


def blocks(markup: str) -> Iterator[Block]:
    """Yields the non-empty blocks of HTML or Mallard: no code, navigation or head, no inline tags."""
    markup = _SKIPPED.sub(" ", markup)
    position, identifier = 0, ""
    for tag in _BLOCK.finditer(markup):
        text = plain(markup[position : tag.start()])
        if text:
            yield Block(identifier, text)
        found = _ID.search(tag["attributes"])
        identifier = found[1] if found and not tag["close"] else ""
        position = tag.end()
    text = plain(markup[position:])
    if text:
        yield Block(identifier, text)


def plain(text: str) -> str:
    """``text`` without tags, with entities resolved and single spaces."""
    return " ".join(html.unescape(_TAG.sub("", text)).split())


def message_text(text: str) -> str:
    """A program's message as a reader sees it: no tags or accelerator marks; a placeholder becomes an ellipsis."""
    text = plain(text.replace("%PRODUCTNAME", "LibreOffice").replace("\\n", " "))
    text = _CJK_ACCELERATOR.sub("", text)
    for mark in _ACCELERATORS:
        if text.count(mark) == 1 and re.search(re.escape(mark) + r"\w", text):
            text = text.replace(mark, "")
    return _PLACEHOLDER.sub("…", text)


def wiki_text(text: str) -> list[str]:
    """Lines of a MediaWiki message without its markup: one form of each plural, a link's label, no tags."""
    while (shorter := _BRACES.sub(_choose, text)) != text:
        text = shorter
    text = _WIKI_LINK.sub(lambda link: link[1].rsplit("|", 1)[-1].lstrip(":"), text)
    text = _WEB_LINK.sub(lambda link: link[1] or link[2], text)
    text = _WIKI_QUOTES.sub("", text)
    lines = (_PLACEHOLDER.sub("…", plain(_WIKI_START.sub("", line))) for line in text.splitlines())
    return [line for line in lines if line]


def _choose(braces: re.Match[str]) -> str:
    """What ``{{NAME:argument|form|form}}`` shows: the last plural, the first gender, the word of a grammar form."""
    name, _, rest = braces[1].partition(":")
    forms = [form for form in rest.split("|")[1:] if not re.match(r"^\d+=", form)]
    name = name.strip().upper()
    if name == "SITENAME":
        return "Wiki"
    if name == "GENDER":
        return forms[0] if forms else ""
    return forms[-1] if forms and name in ("PLURAL", "GRAMMAR") else ""
