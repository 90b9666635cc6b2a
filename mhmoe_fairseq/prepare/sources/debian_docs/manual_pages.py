"""Manual pages: the paragraphs of roff's ``man`` macros, without code, tables and headings."""

from __future__ import annotations

import re
from typing import Iterator

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


def paragraphs(page: str) -> Iterator[str]:
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
            if macro not in (".\\\"", "'\\\""):
                yield from _join(words)
                words, tag = [], macro == ".TP"
            continue
        words.append(inline[1].replace('"', "") if inline else line)
        if tag:  # the line after .TP is the term that the next paragraph explains
            yield from _join(words)
            words, tag = [], False
        elif not line.strip():
            yield from _join(words)
            words = []


def _macro(line: str) -> str:
    """The request that a control line starts with (``.PP``), or an empty string."""
    if line.startswith((".\\\"", "'\\\"")):
        return line[:3]
    return "." + line[1:].split(maxsplit=1)[0] if line.startswith((".", "'")) and line[1:].strip() else ""


def _join(words: list[str]) -> Iterator[str]:
    text = " ".join(unescape(" ".join(words)).split())
    if text:
        yield text


def unescape(text: str) -> str:
    """roff's escapes as characters; fonts and sizes are dropped."""
    return _SPECIAL.sub(_glyph, _FONT.sub("", text))


def _glyph(escape: re.Match[str]) -> str:
    if escape[3] is not None:
        return _CHARACTERS.get(escape[3], "")
    name = escape[1] or escape[2]
    if name in _GLYPHS:
        return _GLYPHS[name]
    code = re.fullmatch(r"u([0-9A-F]{4,5})", name)
    return chr(int(code[1], 16)) if code else ""
