"""The corpus of one language: which lines belong to it, and its parts, without repeated lines, capped.

A line is judged by its scripts, its length, and English words; of what is kept, random lines are looked at once more.
"""

import bisect
import functools
import heapq
import math
import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Container, Iterable, Iterator, Mapping, Optional, Sequence

from ...common.files import atomic_open
from ...data.documents import SeenTexts, clean_line
from ...data.languages import Language
from ..base import TextSettings
from ..binarize import iter_lines
from ..sources.base import Passage, read_passages, write_passages
from ..splits import position, split_of

# First words of letters' names that tell no script: ª º µ, modifier letters, letters of formulas.
_NO_SCRIPT = frozenset("FEMININE MASCULINE MICRO MODIFIER MATHEMATICAL DOUBLE SCRIPT BLACK ANGSTROM".split())
_MAX_FOREIGN_SHARE = 0.2
_MIN_OWN_SHARE = 0.3
_CJK_WEIGHT = 3  # an ideograph stands for about as much as this many letters
KEPT, SHORT, LISTING = "kept_lines", "short_lines", "list_lines"
SCRIPT, ENGLISH = "other_script_lines", "english_lines"
_MIN_WIDTH, _MAX_LENGTH = 10, 2000
_LIST_WORDS, _LIST_WORD_LENGTH = 8, 2  # so many words of at most so many letters on average are a list: a b c aa ab
# Words that are frequent in English and no words of the other languages in Latin script.
_ENGLISH_WORDS = frozenset(
    "the and of is are for with this that from be or not by you your it which will if when has have as used use "
    "should must does any into these they than then only other but were been its their can each such how where "
    "some many more before after between without using".split()
)
_MIN_ENGLISH_WORDS, _MIN_ENGLISH_SHARE = 2, 0.15
_WORD = re.compile(r"[^\W\d_]+")
_NUM_EXAMPLES = 5
_NUM_STEPS = 1 << 12  # of the order in which a cap leaves out units


@functools.lru_cache(maxsize=None)
def script_of(character: str) -> str:
    """Returns ``LATIN``, ``CJK``, ...: the first word of a letter's Unicode name; empty for what is no letter."""
    if not character.isalpha():
        return ""
    word = unicodedata.name(character, "").split(" ")[0].split("-")[0]
    if word in ("FULLWIDTH", "HALFWIDTH"):
        return script_of(unicodedata.normalize("NFKC", character)[0])
    return "" if word in _NO_SCRIPT else word


def letters_by_script(text: str) -> Counter[str]:
    """Counts the letters of each script."""
    letters = Counter(map(script_of, text))
    del letters[""]
    return letters


def foreign_letters(letters: Counter[str], language: Language) -> int:
    """Counts letters of scripts that are neither the language's nor Latin, which names and code are written in."""
    return sum(count for script, count in letters.items() if script != "LATIN" and script not in language.scripts)


def fits(letters: Counter[str], language: Language) -> bool:
    """Whether a line with these letters can be of ``language``.

    It needs a letter; at most a fifth may be of foreign scripts; and of a language that is not written in Latin,
    three tenths must be its own, an ideograph counting for three letters: names and code are in Latin everywhere.
    """
    foreign, total = foreign_letters(letters, language), sum(letters.values())
    if not total or foreign > _MAX_FOREIGN_SHARE * total:
        return False
    if language.is_latin:
        return letters["LATIN"] > 0
    own = sum(letters[script] * (_CJK_WEIGHT if script == "CJK" else 1) for script in language.scripts)
    return own >= _MIN_OWN_SHARE * (own + letters["LATIN"])


def judge(line: str, language: Language, english: SeenTexts | Container[str]) -> str:
    """Returns :data:`KEPT`, or why a line is left out of a translated corpus whose English lines are ``english``."""
    letters = letters_by_script(line)
    if len(line) + (_CJK_WEIGHT - 1) * letters["CJK"] < _MIN_WIDTH:
        return SHORT
    num_words = line.count(" ") + 1
    if len(line) > _MAX_LENGTH or (num_words >= _LIST_WORDS and len(line) < num_words * (_LIST_WORD_LENGTH + 1)):
        return LISTING
    if language.code != "en" and line in english:
        return ENGLISH
    if not fits(letters, language):
        return SCRIPT
    if language.is_latin and language.code != "en" and reads_like_english(line):
        return ENGLISH
    return KEPT


def reads_like_english(line: str) -> bool:
    """Whether at least two words, and 15 % of all, are English function words."""
    words = [word.lower() for word in _WORD.findall(line)]
    english = sum(word in _ENGLISH_WORDS for word in words)
    return english >= _MIN_ENGLISH_WORDS and english >= _MIN_ENGLISH_SHARE * len(words)


def spot_check(text: Path, language: Language, seed: int, num_lines: int = 100) -> dict[str, Any]:
    """Counts lines that do not belong, among ``num_lines`` lines drawn from ``seed``.

    Returns:
        ``lines``; ``foreign_script_lines``, with a letter that is neither of the language's scripts nor Latin;
        ``misfit_lines``, which are mostly of another script; ``scripts``, the shares of the letters; ``examples``
        of lines of the two kinds.
    """
    sample = heapq.nsmallest(num_lines, iter_lines(text), key=lambda line: position(seed, "spot check", line))
    foreign = [line for line in sample if foreign_letters(letters_by_script(line), language)]
    misfits = [line for line in sample if not fits(letters_by_script(line), language)]
    letters = letters_by_script("".join(sample))
    total = sum(letters.values())
    return {
        "lines": len(sample),
        "foreign_script_lines": len(foreign),
        "misfit_lines": len(misfits),
        "scripts": {script: round(count / total, 4) for script, count in letters.most_common()},
        "examples": (foreign + misfits)[:_NUM_EXAMPLES],
    }


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


@dataclass
class LanguageCorpus:
    """Makes ``text/CODE/SPLIT.txt`` and ``held-out/CODE/SPLIT.jsonl`` of one language in a folder.

    Attributes:
        capped: lines of each part that were left out for its size.
    """

    language: Language
    folder: Path
    settings: MultilingualSettings

    def __post_init__(self) -> None:
        self._shares = self.settings.shares
        self._splits = self.settings.splits[::-1]  # held-out parts first: they keep a line that occurs twice
        self._bytes_by_step = [0] * _NUM_STEPS
        self.capped: Counter[str] = Counter()
        self._lines: Counter[str] = Counter()
        self._bytes_by_family: Counter[str] = Counter()

    def outputs(self) -> list[str]:
        """Returns the files that :meth:`make` leaves, relative to ``folder``."""
        code = self.language.code
        texts = [f"text/{code}/{split}.txt" for split in self._splits]
        return texts + [f"held-out/{code}/{split}.jsonl" for split in self._splits if split != "train"]

    def make(
        self, passages: Iterable[tuple[str, Passage]], english: Mapping[str, SeenTexts]
    ) -> dict[str, dict[str, Any]]:
        """Writes the corpus of ``(family, passage)`` pairs, given the English lines of every family; returns counts."""
        write_passages(self._clean(passages, english), self._scratch("clean"))
        seen = SeenTexts()
        for split in self._splits:
            write_passages(self._unique(split, seen), self._scratch(split))
        megabytes = self.settings.max_mb_per_language
        limit = steps_within(self._bytes_by_step, math.inf if megabytes is None else megabytes * 1e6)
        for split in self._splits:
            self._write(split, limit)
            self._scratch(split).unlink()
        self._scratch("clean").unlink()
        if self.capped:
            self._lines["lines_beyond_the_cap"] = self.capped.total()
        return {"lines": dict(self._lines), "bytes_by_family": dict(self._bytes_by_family)}

    def _scratch(self, name: str) -> Path:
        return self.folder / "corpus" / f"{self.language.code}.{name}.jsonl"

    def _clean(self, passages: Iterable[tuple[str, Passage]], english: Mapping[str, SeenTexts]) -> Iterator[Passage]:
        """Yields the passages with what is left of their lines, their names made unique over all families."""
        for family, passage in passages:
            lines = [line for line in map(clean_line, passage.lines) if line]
            self._lines["lines_read"] += len(passage.lines)
            self._lines["empty_lines"] += len(passage.lines) - len(lines)
            kept = lines
            if self.settings.filter_lines:
                verdicts = [judge(line, self.language, english.get(family, ())) for line in lines]
                self._lines.update(verdicts)
                kept = [line for line, verdict in zip(lines, verdicts) if verdict == KEPT]
            if kept:
                complete = passage.key is not None and len(kept) == len(lines)
                key = f"{family}:{passage.key}" if complete else None
                yield Passage(f"{family}:{passage.document}", f"{family}:{passage.unit}", kept, key)

    def _unique(self, split: str, seen: SeenTexts) -> Iterator[Passage]:
        """Yields the passages of one part with the lines that were in none before."""
        for passage in read_passages(self._scratch("clean")):
            if split_of(passage.unit, self.settings.seed, self._shares) != split:
                continue
            lines = [line for line in passage.lines if seen.add(line)]
            self._lines["duplicate_lines"] += len(passage.lines) - len(lines)
            if lines:
                unique = passage._replace(lines=lines, key=passage.key if lines == passage.lines else None)
                self._bytes_by_step[self._step(unique)] += _num_bytes(unique)
                yield unique

    def _step(self, passage: Passage) -> int:
        """The place of a passage's unit in an order that is the same in every language."""
        return int(position(self.settings.seed, "cap", passage.unit) * _NUM_STEPS)

    def _write(self, split: str, limit: int) -> None:
        """Writes a part's text, an empty line between documents, and its passages with a key; ``limit`` is in steps."""
        document, keyed = None, []
        with atomic_open(self.folder / "text" / self.language.code / f"{split}.txt") as stream:
            for passage in read_passages(self._scratch(split)):
                if passage.key is not None and split != "train":
                    keyed.append(passage)  # held out even where the cap leaves it out of the text
                if self._step(passage) >= limit:
                    self.capped[split] += len(passage.lines)
                    continue
                stream.write(b"" if document in (None, passage.document) else b"\n")
                stream.write(("\n".join(passage.lines) + "\n").encode())
                document = passage.document
                self._bytes_by_family[passage.unit.split(":")[0]] += _num_bytes(passage)
        if split != "train":
            write_passages(keyed, self.folder / "held-out" / self.language.code / f"{split}.jsonl")


def steps_within(bytes_by_step: Sequence[int], max_bytes: float) -> int:
    """Returns how many steps fit into ``max_bytes``; at least as many as hold something."""
    first = next((step for step, size in enumerate(bytes_by_step, start=1) if size), 1)
    return max(first, bisect.bisect_right(list(accumulate(bytes_by_step)), max_bytes))


def _num_bytes(passage: Passage) -> int:
    return sum(len(line.encode()) + 1 for line in passage.lines)


def english_lines(passages: Iterable[tuple[str, Passage]]) -> dict[str, SeenTexts]:
    """Returns the cleaned lines of every family."""
    lines: dict[str, SeenTexts] = defaultdict(SeenTexts)
    for family, passage in passages:
        for line in passage.lines:
            lines[family].add(clean_line(line))
    return lines
