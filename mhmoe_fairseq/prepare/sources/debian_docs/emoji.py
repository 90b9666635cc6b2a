"""CLDR's annotations: the name and the keywords of every emoji and some symbols."""

from __future__ import annotations

import html
import re
from typing import Iterator

_ANNOTATION = re.compile(r'<annotation cp="([^"]*)"( type="tts")?[^>]*>([^<]*)<')


def annotation_lines(xml: str) -> Iterator[tuple[str, str]]:
    """Yields the code points in hexadecimal and ``name: keyword, keyword`` of each entry that has a name."""
    keywords: dict[str, list[str]] = {}
    for code_points, is_name, text in _ANNOTATION.findall(xml):
        words = [word.strip() for word in html.unescape(text).split("|")]
        if not is_name:
            keywords[code_points] = words
            continue
        others = [word for word in keywords.get(code_points, []) if word and word != words[0]]
        line = f"{words[0]}: {', '.join(others)}" if others else words[0]
        yield "-".join(f"{ord(character):x}" for character in html.unescape(code_points)), line
