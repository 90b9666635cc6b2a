"""Which lines belong to a language: by their scripts, their length, and English words; and a look at random ones."""

import functools
import heapq
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any, Container

from ...data.languages import Language
from ..binarize import iter_lines
from ..splits import position

# First words of letters' names that tell no script: ª º µ, modifier letters, letters of formulas.
_NO_SCRIPT = frozenset("FEMININE MASCULINE MICRO MODIFIER MATHEMATICAL DOUBLE SCRIPT BLACK ANGSTROM".split())
_MAX_FOREIGN_SHARE = 0.2
_MIN_OWN_SHARE = 0.3
_CJK_WEIGHT = 3  # an ideograph stands for about as much as this many letters
KEPT, SHORT, LISTING = "kept_lines", "short_lines", "list_lines"
SCRIPT, ENGLISH = "other_script_lines", "english_lines"
_MIN_WIDTH, _MAX_LENGTH = 10, 2000
_LIST_WORDS, _LIST_WORD_LENGTH = 8, 2  # so many words of at most so many letters on average are a list: a b c aa ab
# Words that are frequent in English and no words of the other languages in Latin script.
_ENGLISH_WORDS = frozenset(
    "the and of is are for with this that from be or not by you your it which will if when has have as used use "
    "should must does any into these they than then only other but were been its their can each such how where "
    "some many more before after between without using".split()
)
_MIN_ENGLISH_WORDS, _MIN_ENGLISH_SHARE = 2, 0.15
_WORD = re.compile(r"[^\W\d_]+")
_NUM_EXAMPLES = 5


@functools.lru_cache(maxsize=None)
def script_of(character: str) -> str:
    """Returns ``LATIN``, ``CJK``, ...: the first word of a letter's Unicode name; empty for what is no letter."""
    if not character.isalpha():
        return ""
    word = unicodedata.name(character, "").split(" ")[0].split("-")[0]
    if word in ("FULLWIDTH", "HALFWIDTH"):
        return script_of(unicodedata.normalize("NFKC", character)[0])
    return "" if word in _NO_SCRIPT else word


def letters_by_script(text: str) -> Counter[str]:
    """Counts the letters of each script."""
    letters = Counter(map(script_of, text))
    del letters[""]
    return letters


def foreign_letters(letters: Counter[str], language: Language) -> int:
    """Counts letters of scripts that are neither the language's nor Latin, which names and code are written in."""
    return sum(count for script, count in letters.items() if script != "LATIN" and script not in language.scripts)


def fits(letters: Counter[str], language: Language) -> bool:
    """Whether a line with these letters can be of ``language``.

    It needs a letter; at most a fifth may be of foreign scripts; and of a language that is not written in Latin,
    three tenths must be its own, an ideograph counting for three letters: names and code are in Latin everywhere.
    """
    foreign, total = foreign_letters(letters, language), sum(letters.values())
    if not total or foreign > _MAX_FOREIGN_SHARE * total:
        return False
    if language.is_latin:
        return letters["LATIN"] > 0
    own = sum(letters[script] * (_CJK_WEIGHT if script == "CJK" else 1) for script in language.scripts)
    return own >= _MIN_OWN_SHARE * (own + letters["LATIN"])


def judge(line: str, language: Language, english: Container[str]) -> str:
    """Returns :data:`KEPT`, or why a line is left out of a translated corpus whose English lines are ``english``."""
    letters = letters_by_script(line)
    if len(line) + (_CJK_WEIGHT - 1) * letters["CJK"] < _MIN_WIDTH:
        return SHORT
    num_words = line.count(" ") + 1
    if len(line) > _MAX_LENGTH or (num_words >= _LIST_WORDS and len(line) < num_words * (_LIST_WORD_LENGTH + 1)):
        return LISTING
    if language.code != "en" and line in english:
        return ENGLISH
    if not fits(letters, language):
        return SCRIPT
    if language.is_latin and language.code != "en" and reads_like_english(line):
        return ENGLISH
    return KEPT


def reads_like_english(line: str) -> bool:
    """Whether at least two words, and 15 % of all, are English function words."""
    words = [word.lower() for word in _WORD.findall(line)]
    english = sum(word in _ENGLISH_WORDS for word in words)
    return english >= _MIN_ENGLISH_WORDS and english >= _MIN_ENGLISH_SHARE * len(words)


def spot_check(text: Path, language: Language, seed: int, num_lines: int = 100) -> dict[str, Any]:
    """Counts lines that do not belong, among ``num_lines`` lines drawn from ``seed``.

    Returns:
        ``lines``; ``foreign_script_lines``, with a letter that is neither of the language's scripts nor Latin;
        ``misfit_lines``, which are mostly of another script; ``scripts``, the shares of the letters; ``examples``
        of lines of the two kinds.
    """
    sample = heapq.nsmallest(num_lines, iter_lines(text), key=lambda line: position(seed, "spot check", line))
    foreign = [line for line in sample if foreign_letters(letters_by_script(line), language)]
    misfits = [line for line in sample if not fits(letters_by_script(line), language)]
    letters = letters_by_script("".join(sample))
    total = sum(letters.values())
    return {
        "lines": len(sample),
        "foreign_script_lines": len(foreign),
        "misfit_lines": len(misfits),
        "scripts": {script: round(count / total, 4) for script, count in letters.most_common()},
        "examples": (foreign + misfits)[:_NUM_EXAMPLES],
    }
