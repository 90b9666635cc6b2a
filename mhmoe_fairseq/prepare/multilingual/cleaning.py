"""The corpus of one language: from its passages to the text of its parts, cleaned, without repeated lines, capped."""

from collections import Counter
from pathlib import Path
from typing import Any, Container, Iterable, Iterator, Mapping, Optional

from ...common.files import atomic_open
from ...data.documents import SeenTexts, clean_line
from ...data.languages import Language
from ..splits import UnitSplits, position
from .lines import KEPT, judge
from .passages import Passage, read_passages, write_passages

# Held-out parts first: a line that occurs twice is dropped from the training part.
_ORDER = ("test", "valid", "train")
_NUM_STEPS = 1 << 12


class Cap:
    """Bounds the size of a corpus by leaving out whole units, in an order that is the same in every language."""

    def __init__(self, seed: int):
        self._seed = seed
        self._bytes = [0] * _NUM_STEPS

    def _step(self, unit: str) -> int:
        return int(position(self._seed, "cap", unit) * _NUM_STEPS)

    def count(self, unit: str, num_bytes: int) -> None:
        """Notes text of a unit."""
        self._bytes[self._step(unit)] += num_bytes

    def limit(self, max_bytes: float) -> int:
        """Returns how many steps of the order fit into ``max_bytes``; at least one."""
        total = 0
        for step, num_bytes in enumerate(self._bytes):
            total += num_bytes
            if total > max_bytes:
                return max(step, 1)
        return _NUM_STEPS

    def admits(self, unit: str, limit: int) -> bool:
        """Whether a unit is among the first ``limit`` steps."""
        return self._step(unit) < limit


class LanguageCorpus:
    """Makes the corpus of one language.

    Args:
        folder: for the result, ``text/CODE/SPLIT.txt`` and ``held-out/CODE/SPLIT.jsonl``; scratch files beside them.
        splits: what is held out.
        max_bytes: of the language's text; None for no limit.
        filter_lines: whether lines in another script and untranslated English are removed.
    """

    def __init__(
        self, language: Language, folder: Path, splits: UnitSplits, *, max_bytes: Optional[float], filter_lines: bool
    ):
        self._language = language
        self._folder = folder
        self._split_of = splits.split_of
        self._splits = [split for split in _ORDER if split in splits.present]
        self._max_bytes = max_bytes
        self._filter_lines = filter_lines
        self._cap = Cap(splits.seed)
        self._lines: Counter[str] = Counter()
        self._bytes_by_family: Counter[str] = Counter()

    def outputs(self) -> list[str]:
        """Returns the files that :meth:`make` leaves, relative to ``folder``."""
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
        limit = None if self._max_bytes is None else self._cap.limit(self._max_bytes)
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
        for family, passage in passages:
            lines = [line for line in map(clean_line, passage.lines) if line]
            self._lines["lines_read"] += len(passage.lines)
            self._lines["empty_lines"] += len(passage.lines) - len(lines)
            kept = lines
            if self._filter_lines:
                verdicts = [judge(line, self._language, english.get(family, ())) for line in lines]
                self._lines.update(verdicts)
                kept = [line for line, verdict in zip(lines, verdicts) if verdict == KEPT]
            if kept:
                complete = passage.key is not None and len(kept) == len(lines)
                key = f"{family}:{passage.key}" if complete else None
                yield Passage(f"{family}:{passage.document}", f"{family}:{passage.unit}", kept, key)

    def _unique(self, split: str, seen: SeenTexts) -> Iterator[Passage]:
        """Yields the passages of one part with the lines that were in none before."""
        for passage in read_passages(self._scratch("clean")):
            if self._split_of(passage.unit) != split:
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
    """Returns the cleaned lines of every family."""
    lines: dict[str, SeenTexts] = {}
    for family, passage in passages:
        seen = lines.setdefault(family, SeenTexts())
        for line in map(clean_line, passage.lines):
            seen.add(line)
    return lines
