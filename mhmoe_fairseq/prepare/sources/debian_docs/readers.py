"""From a package to passages, one function per family; each reads the archive once for all languages wanted of it."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from itertools import groupby
from pathlib import Path
from typing import Callable, Iterator, Mapping, Optional, Sequence

from ....common.errors import UserError
from ...archives import iter_tar_members, read_deb_data
from ...multilingual.passages import Passage
from .emoji import annotation_lines
from .gettext_catalogue import read_catalogue
from .manual_pages import paragraphs
from .markup import blocks, message_text, wiki_text

_MIN_PARAGRAPH = 40  # characters of a manual page's paragraph; shorter ones are terms and synopses
_CHINESE_MIN_PARAGRAPH = 12
_HIDDEN_VARIANT = re.compile(
    r"<span hidden=\"true\" id=\"[^\"]*\" class=\"[A-Z]+\">(?:<span[^>]*>[^<]*</span>|[^<])*</span>"
)

# What LibreOffice writes where a page includes a paragraph that does not exist.
_BROKEN_INCLUDE = re.compile(r"text/\S+\.xhp#")

Labelled = Iterator[tuple[str, Passage]]
Locate = Callable[[str], Optional[tuple[str, str]]]


def _members(path: Path, locate: Locate, languages: Sequence[str]) -> Iterator[tuple[str, str, bytes]]:
    """``(language, place, content)`` of the files of a package that ``locate`` finds one of ``languages`` for.

    Args:
        locate: from a file's name to its language and its name without the language, or None.
    """

    def is_wanted(name: str) -> bool:
        found = locate(name)
        return found is not None and found[0] in languages

    for name, content in iter_tar_members(path, is_wanted, read_deb_data(path)):
        found = locate(name)
        if found is None:
            continue
        if name.endswith(".gz"):
            try:
                content = gzip.decompress(content)
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"{path}: damaged member {name} ({error}); delete it and run again") from error
        yield (*found, content)


def _by_pattern(pattern: str, codes: Optional[Mapping[Optional[str], str]] = None) -> Locate:
    """Finds language and place by a pattern with the groups ``code`` and, any number of times, ``place...``."""
    compiled = re.compile(pattern)

    def locate(name: str) -> Optional[tuple[str, str]]:
        found = compiled.search(name)
        if found is None:
            return None
        code = found["code"]
        place = "/".join(text for group, text in found.groupdict().items() if group != "code" and text)
        return (codes or {}).get(code, code), place

    return locate


def mediawiki(path: Path, languages: Sequence[str]) -> Labelled:
    """The messages of MediaWiki and its extensions: document = message file, unit and key = message."""
    locate = _by_pattern(r"/mediawiki/(?P<place>.*?)/?i18n/(?P<place2>.*?)/?(?P<code>[\w-]+)\.json$", {"zh-hans": "zh"})
    for language, place, content in _members(path, locate, languages):
        try:
            messages = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: {place} is not valid JSON ({error}); delete it and run again") from error
        for name, message in messages.items():
            if isinstance(message, str):
                key = f"{place}:{name}"
                yield language, Passage(place, key, wiki_text(message), key)


def emoji_names(path: Path, languages: Sequence[str]) -> Labelled:
    """CLDR's name and keywords of every emoji, one line each: unit and key = code points."""
    for language, _, content in _members(path, _by_pattern(r"/common/annotations/(?P<code>\w+)\.xml$"), languages):
        for code_points, line in annotation_lines(content.decode("utf-8", "replace")):
            yield language, Passage("names", code_points, [line], code_points)


def libreoffice_messages(path: Path, languages: Sequence[str]) -> Labelled:
    """LibreOffice's messages: document = catalogue, unit = dialogue, key = message."""
    locate = _by_pattern(r"/resource/(?P<code>\w+)/LC_MESSAGES/(?P<place>\w+)\.mo$", {"zh_CN": "zh"})
    yield from _catalogues(path, locate, languages)


_WORDPRESS_LOCALES = {
    "bg_BG": "bg", "de_DE": "de", "es_ES": "es", "fr_FR": "fr", "ru_RU": "ru", "tr_TR": "tr", "zh_CN": "zh",
}  # fmt: skip


def wordpress(path: Path, languages: Sequence[str]) -> Labelled:
    """WordPress's messages: document = catalogue, unit and key = message; English from the German catalogue."""
    locate = _by_pattern(r"/languages/(?P<place>[a-z-]*?)-?(?P<code>[a-z]{2}(?:_[A-Z]{2})?)\.mo$", _WORDPRESS_LOCALES)
    yield from _catalogues(path, locate, languages)


def _catalogues(path: Path, locate: Locate, languages: Sequence[str]) -> Labelled:
    """The translations of the catalogues and, if ``en`` is wanted, the English messages of the German ones."""
    wanted = [*languages, "de"] if "en" in languages else languages
    for language, place, content in _members(path, locate, wanted):
        for message in read_catalogue(content, f"{path}: {place}"):
            unit = f"{place}:{message.context.split('|')[0] or _digest(message.english)}"
            key = f"{unit}:{_digest(message.context + message.english)}"
            if language in languages:
                yield language, Passage(place, unit, [message_text(message.translation)], key)
            if language == "de" and "en" in languages:
                yield "en", Passage(place, unit, [message_text(message.english)], key)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def libreoffice_help(path: Path, languages: Sequence[str]) -> Labelled:
    """LibreOffice's help: document and unit = page, key = the paragraph's identifier."""
    locate = _by_pattern(r"/help/(?P<code>[\w-]+)/text/(?P<place>.*)\.html$", {"en-US": "en", "zh-CN": "zh"})
    for language, place, content in _members(path, locate, languages):
        page = content.decode("utf-8", "replace")
        body = page[page.find('id="DisplayArea"') : page.find('<div id="SearchFrame">')].partition(">")[2]
        for identifier, same in groupby(blocks(_HIDDEN_VARIANT.sub("", body)), key=lambda block: block.id):
            lines = [block.text for block in same if not _BROKEN_INCLUDE.search(block.text)]
            key = f"{place}#{identifier}" if identifier.startswith(("par_id", "hd_id")) else None
            yield language, Passage(place, place, lines, key)


def manual_pages(path: Path, languages: Sequence[str]) -> Labelled:
    """Manual pages: document and unit = page; paragraphs only, their order differs between languages."""
    pattern = r"/share/man/(?:(?P<code>[a-z]{2}(?:_CN)?)/)?(?P<place>man\d\w*/[^/]+?)(?:\.gz)?$"
    for language, place, content in _members(path, _by_pattern(pattern, {None: "en", "zh_CN": "zh"}), languages):
        least = _CHINESE_MIN_PARAGRAPH if language == "zh" else _MIN_PARAGRAPH
        try:
            page = content.decode()
        except UnicodeDecodeError:
            continue  # a page in an older encoding that it does not name
        lines = [paragraph for paragraph in paragraphs(page) if len(paragraph) >= least]
        if lines:
            yield language, Passage(place, place, lines)


def _pages(path: Path, locate: Locate, languages: Sequence[str]) -> Labelled:
    """Pages of HTML or Mallard: document and unit = page."""
    for language, place, content in _members(path, locate, languages):
        lines = [block.text for block in blocks(content.decode("utf-8", "replace"))]
        yield language, Passage(place, place, lines)


def installation_guide(path: Path, languages: Sequence[str]) -> Labelled:
    """Debian's installation guide."""
    pattern = r"/doc/installation-guide-amd64/(?P<code>\w+)/(?P<place>[^/]+)\.html$"
    yield from _pages(path, _by_pattern(pattern, {"zh_CN": "zh"}), languages)


def gnome_help(path: Path, languages: Sequence[str]) -> Labelled:
    """GNOME's user help and system administration guide."""
    pattern = r"/share/help/(?P<code>[\w@]+)/(?P<place>.*)\.page$"
    yield from _pages(path, _by_pattern(pattern, {"C": "en", "zh_CN": "zh"}), languages)


def debian_reference(path: Path, languages: Sequence[str]) -> Labelled:
    """The Debian Reference."""
    pattern = r"/debian-reference/(?P<place>(?:ch|ap|pr)\w+)\.(?P<code>[\w-]+)\.html$"
    yield from _pages(path, _by_pattern(pattern, {"zh-cn": "zh"}), languages)


_HANDBOOK_LOCALES = {
    "ar-MA": "ar", "de-DE": "de", "el-GR": "el", "en-US": "en", "es-ES": "es", "fr-FR": "fr", "ru-RU": "ru",
    "tr-TR": "tr", "vi-VN": "vi", "zh-CN": "zh",
}  # fmt: skip


def handbook(path: Path, languages: Sequence[str]) -> Labelled:
    """The Debian Administrator's Handbook, without its index."""
    pattern = r"/debian-handbook/html/(?P<code>[\w-]+)/(?P<place>(?!ix)[^/]+)\.html$"
    yield from _pages(path, _by_pattern(pattern, _HANDBOOK_LOCALES), languages)
