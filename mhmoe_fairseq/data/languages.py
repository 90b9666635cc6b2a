"""The languages of the multilingual experiment: codes as XNLI writes them, names, scripts, and dictionary symbols."""

import re
from dataclasses import dataclass
from typing import Iterable

from ..common.errors import UserError


@dataclass(frozen=True)
class Language:
    """A language.

    Args:
        code: ISO 639-1, as XNLI and XLM use it.
        scripts: Unicode scripts of its writing, by the first word of a character's Unicode name (``LATIN``,
            ``CJK``, ...); the first one is its main script.
    """

    code: str
    name: str
    scripts: tuple[str, ...] = ("LATIN",)

    @property
    def is_latin(self) -> bool:
        """Whether it is written in the Latin script."""
        return self.scripts[0] == "LATIN"


LANGUAGES = {
    language.code: language
    for language in (
        Language("ar", "Arabic", ("ARABIC",)),
        Language("bg", "Bulgarian", ("CYRILLIC",)),
        Language("de", "German"),
        Language("el", "Greek", ("GREEK",)),
        Language("en", "English"),
        Language("es", "Spanish"),
        Language("fr", "French"),
        Language("hi", "Hindi", ("DEVANAGARI",)),
        Language("ru", "Russian", ("CYRILLIC",)),
        Language("sw", "Swahili"),
        Language("th", "Thai", ("THAI",)),
        Language("tr", "Turkish"),
        Language("ur", "Urdu", ("ARABIC",)),
        Language("vi", "Vietnamese"),
        Language("zh", "Chinese", ("CJK",)),
    )
}
XNLI_LANGUAGES = tuple(LANGUAGES)
PAPER_LANGUAGES = tuple(code for code in XNLI_LANGUAGES if code != "ar")


def language_symbol(code: str) -> str:
    """Return the dictionary's symbol for a language: ``__de__``."""
    return f"__{code}__"


def get_language(code: str, flag: str = "--langs") -> Language:
    """Return the language with this code; ``UserError`` names ``flag`` and the codes there are."""
    if code not in LANGUAGES:
        raise UserError(f"{flag} {code}: no such language; known are {', '.join(LANGUAGES)}")
    return LANGUAGES[code]


def language_of(tag: str) -> str:
    """Return the language's code out of a tag that says more: ``zh`` of ``zh-Hans``, ``zh_CN`` and ``ZH``."""
    return re.split("[-_]", tag.strip(), maxsplit=1)[0].lower()


def parse_languages(text: str | Iterable[str], flag: str = "--langs") -> tuple[str, ...]:
    """Return the codes in ``de,fr`` or ``["de", "fr"]``, in the order given.

    Raises:
        UserError: no code, an unknown one, or one that is given twice.
    """
    parts = text.split(",") if isinstance(text, str) else [part for item in text for part in item.split(",")]
    codes = [part.strip() for part in parts if part.strip()]
    if not codes:
        raise UserError(f"{flag}: needs at least one language code, such as {','.join(PAPER_LANGUAGES[:3])}")
    for position, code in enumerate(codes):
        get_language(code, flag)
        if code in codes[:position]:
            raise UserError(f"{flag} {code}: given twice")
    return tuple(codes)
