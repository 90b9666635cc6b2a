"""Text out of the formats of Debian's packages: HTML, Mallard, wiki text, gettext catalogues, CLDR, manual pages."""

import html
import re
import struct
from typing import Iterator

from ...common.errors import UserError

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

_MAGICS = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}
_ANNOTATION = re.compile(r'<annotation cp="([^"]*)"( type="tts")?[^>]*>([^<]*)<')

_IGNORED_UNTIL = {".nf": ".fi", ".EX": ".EE", ".TS": ".TE", ".EQ": ".EN", ".ig": ".."}
_INLINE = re.compile(r"^\.\s*(?:B|I|BR|IR|RB|RI|BI|IB|SM|SB)\b\s*(.*)$")
_FONT = re.compile(r"\\f(?:\(..|\[[^\]]*\]|.)|\\s[-+]?\d+|\\m\[[^\]]*\]")
_SPECIAL = re.compile(r"\\(?:\((..)|\[([^\]]+)\]|(.))")
_GLYPHS = {
    "aq": "'", "cq": "’", "oq": "‘", "dq": '"', "lq": "“", "rq": "”", "em": "—", "en": "–", "bu": "•", "co": "©",
    "ha": "^", "ti": "~", "rs": "\\", "ga": "`", "hy": "-", "mu": "×", "->": "→", "<-": "←", ">=": "≥", "<=": "≤",
    "Fo": "«", "Fc": "»", "Bq": "„", "ss": "ß",
}  # fmt: skip
_CHARACTERS = {"-": "-", "e": "\\", " ": " ", "~": " ", "0": " ", "'": "\u00b4", "`": "`", ".": ".", "\\": "\\"}


def blocks(markup: str) -> Iterator[tuple[str, str]]:
    """Yields ``id`` (may be empty) and text of every paragraph, heading, item and cell of HTML or Mallard.

    There is no code, navigation or head among them; a text is one line without tags.
    """
    markup = _SKIPPED.sub(" ", markup)
    position, identifier = 0, ""
    for tag in [*_BLOCK.finditer(markup), None]:
        if text := plain(markup[position : tag.start() if tag else None]):
            yield identifier, text
        if tag:
            found = _ID.search(tag["attributes"])
            identifier = found[1] if found and not tag["close"] else ""
            position = tag.end()


def plain(text: str) -> str:
    """Returns ``text`` without tags, with entities resolved and single spaces."""
    return " ".join(html.unescape(_TAG.sub("", text)).split())


def message_text(text: str) -> str:
    """Returns a program's message as a reader sees it: no tags or accelerators; a placeholder becomes an ellipsis."""
    text = plain(text.replace("%PRODUCTNAME", "LibreOffice").replace("\\n", " "))
    text = _CJK_ACCELERATOR.sub("", text)
    for mark in _ACCELERATORS:
        if text.count(mark) == 1 and re.search(re.escape(mark) + r"\w", text):
            text = text.replace(mark, "")
    return _PLACEHOLDER.sub("…", text)


def wiki_text(text: str) -> list[str]:
    """Returns the lines of a MediaWiki message without its markup: one form of each plural, a link's label, no tags."""
    while (shorter := _BRACES.sub(_choose, text)) != text:
        text = shorter
    text = _WIKI_LINK.sub(lambda link: link[1].rsplit("|", 1)[-1].lstrip(":"), text)
    text = _WEB_LINK.sub(lambda link: link[1] or link[2], text)
    text = _WIKI_QUOTES.sub("", text)
    lines = (_PLACEHOLDER.sub("…", plain(_WIKI_START.sub("", line))) for line in text.splitlines())
    return [line for line in lines if line]


def _choose(braces: re.Match[str]) -> str:
    """Returns what ``{{NAME:argument|form|form}}`` shows: the last plural, the first gender, a grammar form's word."""
    name, _, rest = braces[1].partition(":")
    forms = [form for form in rest.split("|")[1:] if not re.match(r"^\d+=", form)]
    shown = {"SITENAME": ["Wiki"], "GENDER": forms[:1], "PLURAL": forms[-1:], "GRAMMAR": forms[-1:]}
    return "".join(shown.get(name.strip().upper(), ()))


def read_catalogue(content: bytes, name: str) -> Iterator[tuple[str, str, str]]:
    """Yields context (may be empty), English and translation of a ``.mo`` file's messages; of plurals the last form."""
    try:
        order = _MAGICS[content[:4]]
        number, originals, translations = struct.unpack(f"{order}3I", content[8:20])
        for index in range(number):
            context, _, english = _catalogue_text(content, order, originals + 8 * index).rpartition("\x04")
            if english:
                translation = _catalogue_text(content, order, translations + 8 * index)
                yield context, english.rsplit("\0", 1)[-1], translation.rsplit("\0", 1)[-1]
    except (KeyError, struct.error, UnicodeDecodeError) as error:
        raise UserError(f"{name}: not a gettext catalogue in UTF-8 ({error})") from error


def _catalogue_text(content: bytes, order: str, position: int) -> str:
    length, start = struct.unpack(f"{order}2I", content[position : position + 8])
    return content[start : start + length].decode()


def annotation_lines(xml: str) -> Iterator[tuple[str, str]]:
    """Yields the code points in hexadecimal and ``name: keyword, keyword`` of each entry that has a name."""
    keywords: dict[str, list[str]] = {}
    for code_points, is_name, text in _ANNOTATION.findall(xml):
        words = [word.strip() for word in html.unescape(text).split("|")]
        if not is_name:
            keywords[code_points] = words
            continue
        others = ", ".join(word for word in keywords.get(code_points, []) if word and word != words[0])
        line = f"{words[0]}: {others}" if others else words[0]
        yield "-".join(f"{ord(character):x}" for character in html.unescape(code_points)), line


def manual_paragraphs(page: str) -> Iterator[str]:
    """Yields the paragraphs of a page; nothing of one that is written in ``mdoc`` or only names another page."""
    if re.search(r"^\.\s*(?:Dd|so)\b", page, re.MULTILINE):
        return
    words: list[str] = []
    until, tag = "", False
    for line in [*page.replace("\\\n", "").splitlines(), ".PP"]:
        macro = _macro(line)
        if until:
            until = "" if macro == until or line.startswith(until) else until
            continue
        inline = _INLINE.match(line)
        if macro and not inline:
            until = _IGNORED_UNTIL.get(macro, "")
            if macro not in ('.\\"', "'\\\""):
                yield from _paragraph(words)
                words, tag = [], macro == ".TP"
            continue
        words.append(inline[1].replace('"', "") if inline else line)
        if tag:  # the line after .TP is the term that the next paragraph explains
            yield from _paragraph(words)
            words, tag = [], False
        elif not line.strip():
            yield from _paragraph(words)
            words = []


def _macro(line: str) -> str:
    """Returns the request that a control line starts with (``.PP``), or an empty string."""
    if line.startswith(('.\\"', "'\\\"")):
        return line[:3]
    return "." + line[1:].split(maxsplit=1)[0] if line.startswith((".", "'")) and line[1:].strip() else ""


def _paragraph(words: list[str]) -> Iterator[str]:
    """Yields the text, if there is any: roff's escapes as characters, without fonts and sizes."""
    if text := " ".join(_SPECIAL.sub(_glyph, _FONT.sub("", " ".join(words))).split()):
        yield text


def _glyph(escape: re.Match[str]) -> str:
    if escape[3] is not None:
        return _CHARACTERS.get(escape[3], "")
    name = escape[1] or escape[2]
    code = re.fullmatch(r"u([0-9A-F]{4,5})", name)
    return chr(int(code[1], 16)) if code else _GLYPHS.get(name, "")
