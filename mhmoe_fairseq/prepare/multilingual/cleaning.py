"""The corpus of one language: from its passages to the text of its parts, cleaned, without repeated lines, capped."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Container, Iterable, Iterator, Mapping, Optional

from ...common.files import atomic_open
from ...data.documents import SeenTexts, clean_line
from ...data.languages import Language
from .assignment import Assignment, Cap
from .filters import LineFilter
from .passages import Passage, read_passages, write_passages

# Held-out parts first: a line that occurs twice is dropped from the training part.
_ORDER = ("test", "valid", "train")


@dataclass(frozen=True)
class CleaningSettings:
    """How every language is cleaned.

    Args:
        assignment: what is held out.
        max_bytes: of a language's text; None for no limit.
        filter_lines: whether lines in another script and untranslated English are removed.
    """

    assignment: Assignment
    max_bytes: Optional[float]
    filter_lines: bool


class LanguageCorpus:
    """Makes the corpus of one language.

    Args:
        folder: for the result, ``text/CODE/SPLIT.txt`` and ``held-out/CODE/SPLIT.jsonl``; scratch files beside them.
    """

    def __init__(self, language: Language, settings: CleaningSettings, folder: Path):
        self._language = language
        self._settings = settings
        self._folder = folder
        self._splits = [split for split in _ORDER if split in settings.assignment.splits]
        self._cap = Cap(settings.assignment.seed)
        self._lines: Counter[str] = Counter()
        self._bytes_by_family: Counter[str] = Counter()

    def outputs(self) -> list[str]:
        """Files that :meth:`make` leaves, relative to ``folder``."""
        code = self._language.code
        texts = [f"text/{code}/{split}.txt" for split in self._splits]
        return texts + [f"held-out/{code}/{split}.jsonl" for split in self._splits if split != "train"]

    def make(
        self, passages: Iterable[tuple[str, Passage]], english: Mapping[str, Container[str]]
    ) -> dict[str, dict[str, Any]]:
        """Reads ``(family, passage)`` pairs and writes the corpus; returns what was dropped and what is left.

        Args:
            english: the English lines of every family.
        """
        write_passages(self._clean(passages, english), self._scratch("clean"))
        seen = SeenTexts()
        for split in self._splits:
            write_passages(self._unique(split, seen), self._scratch(split))
        limit = None if self._settings.max_bytes is None else self._cap.limit(self._settings.max_bytes)
        for split in self._splits:
            self._write(split, limit)
            self._scratch(split).unlink()
        self._scratch("clean").unlink()
        return {"lines": dict(self._lines), "bytes_by_family": dict(self._bytes_by_family)}

    def _scratch(self, name: str) -> Path:
        return self._folder / "corpus" / f"{self._language.code}.{name}.jsonl"

    def _clean(
        self, passages: Iterable[tuple[str, Passage]], english: Mapping[str, Container[str]]
    ) -> Iterator[Passage]:
        """Yields the passages with what is left of their lines, their names made unique over all families."""
        filters: dict[str, LineFilter] = {}
        for family, passage in passages:
            lines = [line for line in map(clean_line, passage.lines) if line]
            self._lines["lines_read"] += len(passage.lines)
            self._lines["empty_lines"] += len(passage.lines) - len(lines)
            kept = lines
            if self._settings.filter_lines:
                if family not in filters:
                    filters[family] = LineFilter(self._language, english.get(family, ()), self._lines)
                kept = [line for line in lines if filters[family].keep(line)]
            if kept:
                complete = passage.key is not None and len(kept) == len(lines)
                key = f"{family}:{passage.key}" if complete else None
                yield Passage(f"{family}:{passage.document}", f"{family}:{passage.unit}", kept, key)

    def _unique(self, split: str, seen: SeenTexts) -> Iterator[Passage]:
        """Yields the passages of one part with the lines that were in none before."""
        for passage in read_passages(self._scratch("clean")):
            if self._settings.assignment.split_of(passage.unit) != split:
                continue
            lines = [line for line in passage.lines if seen.add(line)]
            self._lines["duplicate_lines"] += len(passage.lines) - len(lines)
            if lines:
                unique = passage._replace(lines=lines, key=passage.key if lines == passage.lines else None)
                self._cap.count(unique.unit, _num_bytes(unique))
                yield unique

    def _write(self, split: str, limit: Optional[int]) -> None:
        """Writes one part's text, an empty line between two documents, and its passages that have a key."""
        document, keyed = None, []
        with atomic_open(self._folder / "text" / self._language.code / f"{split}.txt") as stream:
            for passage in read_passages(self._scratch(split)):
                if passage.key is not None and split != "train":
                    keyed.append(passage)  # held out even where the cap leaves it out of the text
                if limit is not None and not self._cap.admits(passage.unit, limit):
                    self._lines["lines_beyond_the_cap"] += len(passage.lines)
                    continue
                stream.write(b"" if document in (None, passage.document) else b"\n")
                stream.write(("\n".join(passage.lines) + "\n").encode())
                document = passage.document
                self._bytes_by_family[passage.unit.split(":")[0]] += _num_bytes(passage)
        if split != "train":
            write_passages(keyed, self._folder / "held-out" / self._language.code / f"{split}.jsonl")


def _num_bytes(passage: Passage) -> int:
    return sum(len(line.encode()) + 1 for line in passage.lines)


def english_lines(passages: Iterable[tuple[str, Passage]]) -> dict[str, SeenTexts]:
    """The cleaned lines of every family."""
    lines: dict[str, SeenTexts] = {}
    for family, passage in passages:
        seen = lines.setdefault(family, SeenTexts())
        for line in map(clean_line, passage.lines):
            seen.add(line)
    return lines
