"""Documents: how text is cleaned, deduplicated and kept between the stages of a preparation."""

import hashlib
import re
import unicodedata
from dataclasses import dataclass, field
from typing import Iterable, Iterator, NamedTuple, Optional

DEDUP_CHOICES = ("lines", "documents", "none")

_COUNTS = ("lines_read", "empty_lines", "duplicate_lines", "empty_or_duplicate_documents")

# Control characters that are not white space, and the byte order mark.
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff]")
# SentencePiece writes a space as U+2581; the character itself would come back as a space.
SPACE_PIECE = "\u2581"


class Document(NamedTuple):
    """A document: where it came from, its lines, the split it must go to when the source says so, and its domain."""

    name: str
    lines: list[str]
    split: Optional[str] = None
    domain: Optional[str] = None


def clean_line(line: str) -> str:
    """Return the line in NFC with single spaces: no control characters, no leading or trailing space.

    fairseq splits encoded lines at every Unicode white space, so only the plain space may remain.
    """
    line = _CONTROLS.sub("", line).replace(SPACE_PIECE, "_")
    return " ".join(unicodedata.normalize("NFC", line).split())


class SeenTexts:
    """Remembers texts by a 16-byte digest."""

    def __init__(self) -> None:
        self._digests: set[bytes] = set()

    def add(self, text: str) -> bool:
        """Remember a text; return whether it is new."""
        before = len(self._digests)
        self._digests.add(_digest(text))
        return len(self._digests) > before

    def __contains__(self, text: str) -> bool:
        return _digest(text) in self._digests


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


@dataclass
class Cleaner:
    """Cleans and deduplicates a stream of documents, and counts what it dropped.

    Deduplication is global and comes before the split: with ``dedup="lines"`` every line is kept where it occurs
    first and nowhere else, so that no line of a held-out part occurs in the training part.
    """

    dedup: str = "lines"
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_COUNTS, 0))
    _seen: SeenTexts = field(default_factory=SeenTexts, repr=False)

    def clean(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Yield the documents that still have a line."""
        for document in documents:
            lines = list(filter(None, map(clean_line, document.lines)))
            self.counts["lines_read"] += len(document.lines)
            self.counts["empty_lines"] += len(document.lines) - len(lines)
            if kept := self._deduplicate(lines):
                yield document._replace(lines=kept)
            else:
                self.counts["empty_or_duplicate_documents"] += 1

    def _deduplicate(self, lines: list[str]) -> list[str]:
        if self.dedup == "none":
            return lines
        if self.dedup == "documents":
            return lines if self._seen.add("\n".join(lines)) else []
        kept = [line for line in lines if self._seen.add(line)]
        self.counts["duplicate_lines"] += len(lines) - len(kept)
        return kept
