"""The corpus of one language: from its passages to the text of its parts, cleaned, without repeated lines, capped."""

import bisect
import math
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Container, Iterable, Iterator, Mapping, Optional, Sequence

from ...common.files import atomic_open
from ...data.documents import SeenTexts, clean_line
from ...data.languages import Language
from ..base import TextSettings
from ..splits import position, split_of
from .lines import KEPT, judge
from .passages import Passage, read_passages, write_passages

_NUM_STEPS = 1 << 12  # of the order in which a cap leaves out units


@dataclass(frozen=True, kw_only=True)
class MultilingualSettings(TextSettings):
    """How the languages are prepared.

    Args:
        filter_lines: whether lines in another script and untranslated English are removed.
        vocab_sampling_alpha: the vocabulary sees languages by (their share of the characters) ** alpha.
        max_mb_per_language: of text, in 10**6 bytes; None for no limit.
    """

    languages: tuple[str, ...]
    filter_lines: bool
    tokenizer_lines: int = 120_000
    vocab_sampling_alpha: float = 0.5
    max_mb_per_language: Optional[float] = 2.0

    def identity(self) -> dict[str, Any]:
        """Returns the settings by flag, the languages as ``langs``."""
        identity = super().identity()
        return {"langs": identity.pop("languages"), **identity}


class LanguageCorpus:
    """Makes ``text/CODE/SPLIT.txt`` and ``held-out/CODE/SPLIT.jsonl`` of one language in a folder."""

    def __init__(self, language: Language, folder: Path, settings: MultilingualSettings):
        self._language = language
        self._folder = folder
        self._settings = settings
        self._shares = settings.shares
        self._splits = settings.splits[::-1]  # held-out parts first: a line that occurs twice is dropped from training
        self._bytes_by_step = [0] * _NUM_STEPS
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
        megabytes = self._settings.max_mb_per_language
        limit = steps_within(self._bytes_by_step, math.inf if megabytes is None else megabytes * 1e6)
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
            if self._settings.filter_lines:
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
            if split_of(passage.unit, self._settings.seed, self._shares) != split:
                continue
            lines = [line for line in passage.lines if seen.add(line)]
            self._lines["duplicate_lines"] += len(passage.lines) - len(lines)
            if lines:
                unique = passage._replace(lines=lines, key=passage.key if lines == passage.lines else None)
                self._bytes_by_step[self._step(unique)] += _num_bytes(unique)
                yield unique

    def _step(self, passage: Passage) -> int:
        """The place of a passage's unit in an order that is the same in every language."""
        return int(position(self._settings.seed, "cap", passage.unit) * _NUM_STEPS)

    def _write(self, split: str, limit: int) -> None:
        """Writes a part's text, an empty line between documents, and its passages with a key; ``limit`` is in steps."""
        document, keyed = None, []
        with atomic_open(self._folder / "text" / self._language.code / f"{split}.txt") as stream:
            for passage in read_passages(self._scratch(split)):
                if passage.key is not None and split != "train":
                    keyed.append(passage)  # held out even where the cap leaves it out of the text
                if self._step(passage) >= limit:
                    self._lines["lines_beyond_the_cap"] += len(passage.lines)
                    continue
                stream.write(b"" if document in (None, passage.document) else b"\n")
                stream.write(("\n".join(passage.lines) + "\n").encode())
                document = passage.document
                self._bytes_by_family[passage.unit.split(":")[0]] += _num_bytes(passage)
        if split != "train":
            write_passages(keyed, self._folder / "held-out" / self._language.code / f"{split}.jsonl")


def steps_within(bytes_by_step: Sequence[int], max_bytes: float) -> int:
    """Returns how many steps fit into ``max_bytes``; at least one."""
    return max(1, bisect.bisect_right(list(accumulate(bytes_by_step)), max_bytes))


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
