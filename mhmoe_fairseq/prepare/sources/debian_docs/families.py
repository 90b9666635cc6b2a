"""The families by name, with their packages by language and their licences."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator, Mapping, Sequence

from ...multilingual.passages import Passage
from . import readers

Reader = Callable[[Path, Sequence[str]], Iterator[tuple[str, Passage]]]


@dataclass(frozen=True)
class Family:
    """One kind of text.

    Args:
        name: also the start of its keys.
        summary: what it is, for people.
        licence: of the packages.
        packages: package -> the languages that are read from it.
        read: from a package's path and the languages wanted of it to ``(language, passage)`` in a fixed order.
    """

    name: str
    summary: str
    licence: str
    packages: Mapping[str, tuple[str, ...]]
    read: Reader

    def packages_for(self, languages: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """The packages that hold one of ``languages``, with those they hold."""
        wanted = {
            package: tuple(code for code in held if code in languages) for package, held in self.packages.items()
        }
        return {package: held for package, held in wanted.items() if held}


def _per_language(prefix: str, codes: str) -> dict[str, tuple[str, ...]]:
    """``{"PREFIX-de": ("de",), ...}``; Debian writes simplified Chinese ``zh-cn`` and English ``en-us`` in places."""
    return {f"{prefix}-{code}": (code.split("-")[0],) for code in codes.split()}


_EVERY = ("ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh")
# LibreOffice's catalogues hold the English messages too: they are read from the German one.
_LIBREOFFICE_CATALOGUES = {
    **_per_language("libreoffice-l10n", "ar bg de el es fr hi ru th tr vi zh-cn"),
    "libreoffice-l10n-de": ("de", "en"),
}

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "mediawiki", "messages of a wiki, by message key", "GPL-2+",
            {"mediawiki": _EVERY}, readers.mediawiki,
        ),
        Family(
            "emoji", "names and keywords of emoji, by code point", "Unicode-DFS-2016",
            {"unicode-cldr-core": _EVERY}, readers.emoji_names,
        ),
        Family(
            "lo-ui", "LibreOffice's messages, by message", "MPL-2.0",
            _LIBREOFFICE_CATALOGUES, readers.libreoffice_messages,
        ),
        Family(
            "lo-help", "LibreOffice's help, by page and paragraph", "MPL-2.0",
            _per_language("libreoffice-help", "de el en-us es fr hi ru tr vi zh-cn"), readers.libreoffice_help,
        ),
        Family(
            "wordpress", "messages of a web log, by message", "GPL-2+",
            {"wordpress-l10n": tuple(code for code in _EVERY if code != "hi")}, readers.wordpress,
        ),
        Family(
            "manpages", "manual pages", "GPL-3+ and others, page by page",
            {**_per_language("manpages", "de el es fr ru tr vi zh"), "manpages": ("en",), "manpages-dev": ("en",)},
            readers.manual_pages,
        ),
        Family(
            "d-i-guide", "Debian's installation guide", "GPL-2",
            {"installation-guide-amd64": ("de", "el", "en", "es", "fr", "ru", "vi", "zh")}, readers.installation_guide,
        ),
        Family(
            "gnome-docs", "GNOME's user help", "CC-BY-SA-3.0",
            {"gnome-user-docs": ("de", "el", "en", "es", "fr", "hi", "ru", "tr", "vi", "zh")}, readers.gnome_help,
        ),
        Family(
            "debian-reference", "the Debian Reference", "GPL-2+",
            _per_language("debian-reference", "de en es fr zh-cn"), readers.debian_reference,
        ),
        Family(
            "handbook", "the Debian Administrator's Handbook", "GPL-2+ or CC-BY-SA-3.0",
            {"debian-handbook": ("ar", "de", "el", "en", "es", "fr", "ru", "tr", "vi", "zh")}, readers.handbook,
        ),
    )
}  # fmt: skip
