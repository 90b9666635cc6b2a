"""Text in many languages out of Debian's packages: translated documentation and programs' messages.

A *family* is one kind of text: which packages hold it, in which languages, and how it is read. Nothing is installed.
"""

import argparse
import contextlib
import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Optional, Sequence

from ...common.arguments import nonempty
from ...common.errors import UserError
from ...common.files import atomic_open
from ..archives import Archive, Say, fetch, iter_deb_members
from .base import MULTILINGUAL_SOURCES, MultilingualCorpus, Passage, SourceKind, Stage, passage_line, read_passages
from .debian_formats import annotation_lines, blocks, manual_paragraphs, message_text, read_catalogue, wiki_text

_MIN_PARAGRAPH = 40  # characters of a manual page's paragraph; shorter ones are terms and synopses
_CHINESE_MIN_PARAGRAPH = 12
_HIDDEN_VARIANT = re.compile(
    r"<span hidden=\"true\" id=\"[^\"]*\" class=\"[A-Z]+\">(?:<span[^>]*>[^<]*</span>|[^<])*</span>"
)
_BROKEN_INCLUDE = re.compile(r"text/\S+\.xhp#")  # LibreOffice's mark of a paragraph that does not exist
_INSTEAD = "choose other families (--debian-families) or another source (text DIR, jsonl DIR)"

Labelled = Iterator[tuple[str, Passage]]


class Member(NamedTuple):
    """A file of a package, its ``path`` without what tells the language; ``package`` is for error messages."""

    language: str
    path: str
    content: bytes
    package: Path

    @property
    def text(self) -> str:
        """The content as text."""
        return self.content.decode("utf-8", "replace")


@dataclass(frozen=True)
class Family:
    """One kind of text.

    Args:
        name: also the start of its keys.
        packages: package -> the languages that are read from it.
        pattern: of the files' names, with the groups ``code`` (the language) and, any number of times, ``path...``.
        parse: from a file to ``(language, passage)`` in a fixed order.
        codes: the language of a ``code`` that is not its own.
        english_in: the language whose files hold the English text, too.
    """

    name: str
    summary: str
    licence: str
    packages: Mapping[str, tuple[str, ...]]
    pattern: str
    parse: Callable[[Member], Labelled]
    codes: Mapping[Optional[str], str] | Mapping[str, str] = field(default_factory=dict)
    english_in: str = ""

    def packages_for(self, languages: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Returns the packages that hold one of ``languages``, with those they hold."""
        wanted = {package: tuple(code for code in held if code in languages) for package, held in self.packages.items()}
        return {package: held for package, held in wanted.items() if held}

    def read(self, package: Path, languages: Sequence[str]) -> Labelled:
        """Yields language and passage from a package, read once for all; ``UserError`` if it is damaged."""
        wanted = {*languages, *([self.english_in] if "en" in languages else [])}
        for name, content in iter_deb_members(package, lambda name: self._locate(name)[0] in wanted):
            code, path = self._locate(name)
            assert code is not None, "a file of a wanted language"
            for language, passage in self.parse(Member(code, path, content, package)):
                if language in languages:
                    yield language, passage

    def _locate(self, name: str) -> tuple[Optional[str], str]:
        found = re.search(self.pattern, name)
        if found is None:
            return None, ""
        path = "/".join(text for group, text in found.groupdict().items() if group != "code" and text)
        return self.codes.get(found["code"], found["code"]), path


def _wiki_messages(member: Member) -> Labelled:
    """Yields the messages of a wiki: document = message file, unit and key = message."""
    try:
        messages = json.loads(member.content)
    except (ValueError, RecursionError) as error:
        origin = f"{member.package}: {member.path}"
        raise UserError(f"{origin} is not valid JSON ({error}); delete it and run again") from error
    for name, message in messages.items():
        if isinstance(message, str):
            key = f"{member.path}:{name}"
            yield member.language, Passage(member.path, key, wiki_text(message), key)


def _emoji_names(member: Member) -> Labelled:
    """Yields name and keywords of every emoji in one line; unit and key = code points."""
    for code_points, line in annotation_lines(member.text):
        yield member.language, Passage("names", code_points, [line], code_points)


def _catalogue(member: Member) -> Labelled:
    """Yields translations, and English from the German catalogue: unit = dialogue or message, key = message."""
    for context, english, translation in read_catalogue(member.content, f"{member.package}: {member.path}"):
        unit = f"{member.path}:{context.split('|')[0] or _digest(english)}"
        key = f"{unit}:{_digest(context + english)}"
        yield member.language, Passage(member.path, unit, [message_text(translation)], key)
        if member.language == "de":
            yield "en", Passage(member.path, unit, [message_text(english)], key)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _libreoffice_help(member: Member) -> Labelled:
    """Yields the paragraphs of a page of help: document and unit = page, key = the paragraph's identifier."""
    page = member.text
    body = page[page.find('id="DisplayArea"') : page.find('<div id="SearchFrame">')].partition(">")[2]
    for identifier, same in groupby(blocks(_HIDDEN_VARIANT.sub("", body)), key=itemgetter(0)):
        lines = [text for _, text in same if not _BROKEN_INCLUDE.search(text)]
        key = f"{member.path}#{identifier}" if identifier.startswith(("par_id", "hd_id")) else None
        yield member.language, Passage(member.path, member.path, lines, key)


def _manual_page(member: Member) -> Labelled:
    """Yields one page: document and unit = page; paragraphs only, their order differs between languages."""
    least = _CHINESE_MIN_PARAGRAPH if member.language == "zh" else _MIN_PARAGRAPH
    try:
        page = member.content.decode()
    except UnicodeDecodeError:
        return  # a page in an older encoding that it does not name
    lines = [paragraph for paragraph in manual_paragraphs(page) if len(paragraph) >= least]
    if lines:
        yield member.language, Passage(member.path, member.path, lines)


def _page(member: Member) -> Labelled:
    """Yields one page of HTML or Mallard: document and unit = page."""
    yield member.language, Passage(member.path, member.path, [text for _, text in blocks(member.text)])


def _per_language(prefix: str, codes: str) -> dict[str, tuple[str, ...]]:
    """Returns ``{"PREFIX-de": ("de",), ...}``; Debian also has simplified Chinese as ``zh-cn`` and ``en-us``."""
    return {f"{prefix}-{code}": (code.split("-")[0],) for code in codes.split()}


_EVERY = ("ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh")
# LibreOffice's catalogues hold the English messages too: they are read from the German one.
_CATALOGUES = _per_language("libreoffice-l10n", "ar bg de el es fr hi ru th tr vi zh-cn")
_MANUALS = {**_per_language("manpages", "de el es fr ru tr vi zh"), "manpages": ("en",), "manpages-dev": ("en",)}
_WORDPRESS_CODES = {code: code[:2] for code in "bg_BG de_DE es_ES fr_FR ru_RU tr_TR zh_CN".split()}
_HANDBOOK_CODES = {code: code[:2] for code in "ar-MA de-DE el-GR en-US es-ES fr-FR ru-RU tr-TR vi-VN zh-CN".split()}

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "mediawiki", "messages of a wiki, by message key", "GPL-2+", {"mediawiki": _EVERY},
            r"/mediawiki/(?P<path>.*?)/?i18n/(?P<path2>.*?)/?(?P<code>[\w-]+)\.json$", _wiki_messages,
            {"zh-hans": "zh"},
        ),
        Family(
            "emoji", "names and keywords of emoji, by code point", "Unicode-DFS-2016", {"unicode-cldr-core": _EVERY},
            r"/common/annotations/(?P<code>\w+)\.xml$", _emoji_names,
        ),
        Family(
            "lo-ui", "LibreOffice's messages, by message", "MPL-2.0",
            {**_CATALOGUES, "libreoffice-l10n-de": ("de", "en")},
            r"/resource/(?P<code>\w+)/LC_MESSAGES/(?P<path>\w+)\.mo$", _catalogue, {"zh_CN": "zh"}, "de",
        ),
        Family(
            "lo-help", "LibreOffice's help, by page and paragraph", "MPL-2.0",
            _per_language("libreoffice-help", "de el en-us es fr hi ru tr vi zh-cn"),
            r"/help/(?P<code>[\w-]+)/text/(?P<path>.*)\.html$", _libreoffice_help, {"en-US": "en", "zh-CN": "zh"},
        ),
        Family(
            "wordpress", "messages of a web log, by message", "GPL-2+",
            {"wordpress-l10n": tuple(code for code in _EVERY if code != "hi")},
            r"/languages/(?:(?P<path>[a-z-]+)-)?(?P<code>[a-z]{2}(?:_[A-Z]{2})?)\.mo$",
            _catalogue, _WORDPRESS_CODES, "de",
        ),
        Family(
            "manpages", "manual pages", "GPL-3+ and others, page by page", _MANUALS,
            r"/share/man/(?:(?P<code>[a-z]{2}(?:_CN)?)/)?(?P<path>man\d\w*/[^/]+?)(?:\.gz)?$", _manual_page,
            {None: "en", "zh_CN": "zh"},
        ),
        Family(
            "d-i-guide", "Debian's installation guide", "GPL-2",
            {"installation-guide-amd64": ("de", "el", "en", "es", "fr", "ru", "vi", "zh")},
            r"/doc/installation-guide-amd64/(?P<code>\w+)/(?P<path>[^/]+)\.html$", _page, {"zh_CN": "zh"},
        ),
        Family(
            "gnome-docs", "GNOME's user help", "CC-BY-SA-3.0",
            {"gnome-user-docs": ("de", "el", "en", "es", "fr", "hi", "ru", "tr", "vi", "zh")},
            r"/share/help/(?P<code>[\w@]+)/(?P<path>.*)\.page$", _page, {"C": "en", "zh_CN": "zh"},
        ),
        Family(
            "debian-reference", "the Debian Reference", "GPL-2+",
            _per_language("debian-reference", "de en es fr zh-cn"),
            r"/debian-reference/(?P<path>(?:ch|ap|pr)\w+)\.(?P<code>[\w-]+)\.html$", _page, {"zh-cn": "zh"},
        ),
        Family(
            "handbook", "the Debian Administrator's Handbook", "GPL-2+ or CC-BY-SA-3.0",
            {"debian-handbook": ("ar", "de", "el", "en", "es", "fr", "ru", "tr", "vi", "zh")},
            r"/debian-handbook/html/(?P<code>[\w-]+)/(?P<path>(?!ix)[^/]+)\.html$", _page, _HANDBOOK_CODES,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class DebianDocs:
    """Translated documentation and messages out of Debian packages, of some of :data:`FAMILIES`."""

    families: tuple[str, ...] = tuple(FAMILIES)
    name: str = "debian-docs"
    filter_lines: bool = True

    def identity(self, languages: Sequence[str]) -> dict[str, object]:
        """Returns the families; their versions are what the suite has, and only recorded."""
        return {"families": list(self.families)}

    def now_available(self, provenance: Mapping[str, Any], cache_dir: Path) -> list[str]:
        """Returns the packages that an earlier preparation had to leave out, and that can be had now."""
        absent = [package for record in provenance["families"].values() for package in record["absent"]]
        return [package for package in absent if _archive(package).can_be_had(cache_dir)]

    def open(
        self, languages: Sequence[str], folder: Path, stage: Stage, cache_dir: Path, say: Say
    ) -> MultilingualCorpus:
        """Extracts the families into ``folder``, each in a stage; ``UserError`` if there is none, or one is damaged."""
        wanted = list(dict.fromkeys([*languages, "en"]))  # English tells what is not translated
        stage("find packages", [], partial(self._require_one, wanted, cache_dir))
        records: dict[str, dict[str, Any]] = {}
        for name in self.families:
            outputs = [f"{folder.name}/{name}/{code}.jsonl" for code in wanted]
            extract = partial(_extract, FAMILIES[name], wanted, folder / name, cache_dir, say)
            records[name] = stage(f"extract {name}", outputs, extract)
        missing = {code: _missing(records, code) for code in languages}
        return MultilingualCorpus(
            provenance={"families": records},
            sources={code: [name for name in self.families if name not in missing[code]] for code in languages},
            missing=missing,
            passages=lambda code: (
                (name, passage) for name in self.families for passage in read_passages(folder / name / f"{code}.jsonl")
            ),
        )

    def _require_one(self, languages: Sequence[str], cache_dir: Path) -> None:
        """Checks, before anything is extracted for good, that there is something to extract."""
        packages = [package for name in self.families for package in FAMILIES[name].packages_for(languages)]
        if not any(_findable(package, cache_dir).can_be_had(cache_dir) for package in packages):
            raise UserError(
                "--source debian-docs: apt knows none of the packages; run apt-get update first, put the .deb files "
                "into --cache-dir, or choose another source (text DIR, jsonl DIR)"
            )


def _archive(package: str) -> Archive:
    return Archive("apt-get", package, None, f"{package}_*.deb", instead=_INSTEAD)


def _findable(package: str, cache_dir: Path) -> Archive:
    """A package's archive; ``UserError`` if it is not there, nor the program that fetches it."""
    archive = _archive(package)
    if not any(cache_dir.glob(archive.filename)):
        archive.check_client()
    return archive


def _missing(records: dict[str, dict[str, Any]], code: str) -> dict[str, str]:
    """Returns why a language has none of a family, by family."""
    missing = {}
    for name, record in records.items():
        if not record["passages"].get(code):
            absent = ", ".join(package for package in record["absent"] if code in FAMILIES[name].packages[package])
            missing[name] = f"not in this suite: {absent}" if absent else "Debian has it in other languages only"
    return missing


def _extract(family: Family, languages: Sequence[str], folder: Path, cache_dir: Path, say: Say) -> dict[str, Any]:
    """Writes a family's passages by language; returns its packages with versions and hashes, and counts."""
    packages, absent = [], []
    counts: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        streams = {code: stack.enter_context(atomic_open(folder / f"{code}.jsonl")) for code in languages}
        for package, held in family.packages_for(languages).items():
            archive = _findable(package, cache_dir)
            if not archive.can_be_had(cache_dir):
                absent.append(package)
                continue
            path, provenance = fetch(archive, cache_dir, say)
            packages.append(provenance)
            for code, passage in family.read(path, held):
                streams[code].write(passage_line(passage))
                counts[code] += 1
    say(f"extract: {family.name} ({family.summary}): {sum(counts.values())} passages")
    return {"licence": family.licence, "packages": packages, "absent": absent, "passages": dict(counts)}


def _build(args: argparse.Namespace) -> DebianDocs:
    for family in args.debian_families:
        if family not in FAMILIES:
            raise UserError(f"--debian-families {family}: must be one of {', '.join(FAMILIES)}")
    return DebianDocs(tuple(family for family in FAMILIES if family in args.debian_families))


_NAMES = {
    "type": nonempty, "nargs": "+", "default": list(FAMILIES), "metavar": "NAME",
    "help": f"for debian-docs: which of {', '.join(FAMILIES)}",
}  # fmt: skip
MULTILINGUAL_SOURCES["debian-docs"] = SourceKind(_build, flags={"--debian-families": _NAMES})
