"""Which script a line is written in, and whether it can be a line of a language."""

from __future__ import annotations

import functools
import unicodedata
from collections import Counter

from ...data.languages import Language

# First words of letters' names that tell no script: ª º µ, modifier letters, letters of formulas.
_NO_SCRIPT = frozenset("FEMININE MASCULINE MICRO MODIFIER MATHEMATICAL DOUBLE SCRIPT BLACK ANGSTROM".split())
_MAX_FOREIGN_SHARE = 0.2
_MIN_OWN_SHARE = 0.3
_CJK_WEIGHT = 3  # an ideograph stands for about as much as this many letters


@functools.lru_cache(maxsize=None)
def script_of(character: str) -> str:
    """``LATIN``, ``CJK``, ...: the first word of a letter's Unicode name; empty for what is no letter."""
    if not character.isalpha():
        return ""
    word = unicodedata.name(character, "").split(" ")[0].split("-")[0]
    if word in ("FULLWIDTH", "HALFWIDTH"):
        return script_of(unicodedata.normalize("NFKC", character)[0])
    return "" if word in _NO_SCRIPT else word


def letters_by_script(text: str) -> Counter[str]:
    """How many letters of each script ``text`` has."""
    letters: Counter[str] = Counter()
    for character, count in Counter(text).items():
        script = script_of(character)
        if script:
            letters[script] += count
    return letters


def foreign_letters(letters: Counter[str], language: Language) -> int:
    """Letters of scripts that are neither the language's nor Latin, which names and code are written in."""
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
