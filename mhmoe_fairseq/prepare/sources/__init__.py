"""Where English text comes from: one module per source, one interface for all (:class:`Source`)."""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Iterator, NamedTuple, Protocol

from ...data.documents import Document


class OpenedSource(NamedTuple):
    """A source that is ready to be read: what the manifest says about it, and its documents in a fixed order."""

    provenance: dict[str, object]
    documents: Iterator[Document]


class Source(Protocol):
    """A corpus by name.

    ``identity`` is what makes two preparations differ (versions, hashes of input files); it is computed without
    fetching anything. ``open`` fetches what is needed and returns the documents.
    """

    @property
    def name(self) -> str: ...

    @property
    def licence(self) -> str: ...

    @property
    def unit(self) -> str: ...

    def identity(self) -> dict[str, object]: ...

    def open(self, cache_dir: Path, say: Callable[[str], None]) -> OpenedSource: ...
