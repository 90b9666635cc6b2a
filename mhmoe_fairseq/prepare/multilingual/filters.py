"""Which lines of a translated corpus are left out: too short, a list of letters, another script, untranslated."""

from __future__ import annotations

import re
from collections import Counter
from typing import Container

from ...data.languages import Language
from .scripts import fits, letters_by_script

KEPT, SHORT, LISTING = "kept_lines", "short_lines", "list_lines"
SCRIPT, ENGLISH = "other_script_lines", "english_lines"
_MIN_WIDTH, _MAX_LENGTH = 10, 2000
_LIST_WORDS, _LIST_WORD_LENGTH = 8, 2  # so many words of at most so many letters on average are a list: a b c aa ab
_CJK_WIDTH = 3  # an ideograph counts for three characters
# Words that are frequent in English and no words of the other languages in Latin script.
_ENGLISH_WORDS = frozenset(
    "the and of is are for with this that from be or not by you your it which will if when has have as used use "
    "should must does any into these they than then only other but were been its their can each such how where "
    "some many more before after between without using".split()
)
_MIN_ENGLISH_WORDS, _MIN_ENGLISH_SHARE = 2, 0.15
_WORD = re.compile(r"[^\W\d_]+")


class LineFilter:
    """Judges the lines of one language and one family of sources, and counts the verdicts.

    Args:
        language: of the lines.
        english: the English lines of the same family.
        counts: where the verdicts are counted.
    """

    def __init__(self, language: Language, english: Container[str], counts: Counter[str]):
        self._language = language
        self._english = english
        self._counts = counts

    def keep(self, line: str) -> bool:
        """Whether a cleaned line stays."""
        verdict = self._judge(line)
        self._counts[verdict] += 1
        return verdict == KEPT

    def _judge(self, line: str) -> str:
        letters = letters_by_script(line)
        if len(line) + (_CJK_WIDTH - 1) * letters["CJK"] < _MIN_WIDTH:
            return SHORT
        num_words = line.count(" ") + 1
        if len(line) > _MAX_LENGTH or (num_words >= _LIST_WORDS and len(line) < num_words * (_LIST_WORD_LENGTH + 1)):
            return LISTING
        if self._language.code != "en" and line in self._english:
            return ENGLISH
        if not fits(letters, self._language):
            return SCRIPT
        if self._language.is_latin and self._language.code != "en" and reads_like_english(line):
            return ENGLISH
        return KEPT


def reads_like_english(line: str) -> bool:
    """Whether at least two words, and 15 % of all, are English function words."""
    words = [word.lower() for word in _WORD.findall(line)]
    english = sum(word in _ENGLISH_WORDS for word in words)
    return english >= _MIN_ENGLISH_WORDS and english >= _MIN_ENGLISH_SHARE * len(words)
