"""Passages: the pieces of text that sources of many languages yield, their files, and those that are translations."""

import contextlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Optional, Protocol, Sequence

from ...common.files import atomic_open, json_line
from ..archives import Say

Stage = Callable[[str, list[str], Callable[[], Any]], Any]


class Passage(NamedTuple):
    """A few lines of text in one language.

    Args:
        document: passages of one document stand together, one after the other.
        unit: what is held out together, named alike in all languages: a page, a dialogue, a message.
        lines: the text.
        key: names the same text in all languages; None where the source does not say what translates what.
    """

    document: str
    unit: str
    lines: list[str]
    key: Optional[str] = None


@dataclass(frozen=True)
class MultilingualCorpus:
    """A source that is ready to be read.

    Args:
        provenance: what the manifest says about it.
        sources: language -> where its text is from.
        missing: language -> what it lacks -> why.
        passages: from a language's code to ``(family, passage)`` pairs in a fixed order.
        has_english: whether ``passages("en")`` is the English text of the same families.
    """

    provenance: dict[str, Any]
    sources: Mapping[str, Sequence[str]]
    missing: Mapping[str, Mapping[str, str]]
    passages: Callable[[str], Iterator[tuple[str, Passage]]]
    has_english: bool


class MultilingualSource(Protocol):
    """A corpus in many languages by name.

    ``filter_lines`` says whether lines in other scripts and untranslated English are removed unless the user says
    otherwise. ``identity`` is what makes two preparations differ; it checks what can be checked without fetching.
    ``open`` fetches what is needed; it may keep files in ``folder``, made by stages that are not repeated.
    """

    name: str
    filter_lines: bool

    def identity(self, languages: Sequence[str]) -> dict[str, object]: ...

    def open(
        self, languages: Sequence[str], folder: Path, stage: Stage, cache_dir: Path, say: Say
    ) -> MultilingualCorpus: ...


@contextlib.contextmanager
def open_passages(path: Path) -> Iterator[Callable[[Passage], None]]:
    """Gives a function that writes a passage, as one JSON list a line, to ``path``, which appears at the end."""
    with atomic_open(path) as stream:

        def write(passage: Passage) -> None:
            # half a surrogate pair cannot be written in UTF-8
            stream.write((json.dumps(passage, ensure_ascii=False) + "\n").encode("utf-8", "replace"))

        yield write


def write_passages(passages: Iterable[Passage], path: Path) -> None:
    """Writes all of ``passages`` to ``path``, atomically."""
    with open_passages(path) as write:
        for passage in passages:
            write(passage)


def read_passages(path: Path) -> Iterator[Passage]:
    """Yields what :func:`write_passages` wrote, in order."""
    with open(path, encoding="utf-8", newline="\n") as stream:
        for line in stream:
            yield Passage(*json.loads(line))


def write_aligned(held_out: Path, split: str, languages: Sequence[str], target: Path) -> Counter[str]:
    """Writes ``{"key": ..., "text": {"en": ..., "de": ...}}`` for every key that two languages or more have.

    Args:
        held_out: folder with ``CODE/SPLIT.jsonl`` passages that have keys.

    Returns:
        how many keys there are (``keys``), and how many each language has.
    """
    texts: dict[str, dict[str, str]] = {}
    for code in languages:
        for passage in read_passages(held_out / code / f"{split}.jsonl"):
            texts.setdefault(str(passage.key), {}).setdefault(code, " ".join(passage.lines))
    counts: Counter[str] = Counter()
    with atomic_open(target) as stream:
        for key in sorted(texts):
            if len(texts[key]) > 1:
                counts.update(["keys", *texts[key]])
                stream.write(json_line({"key": key, "text": texts[key]}))
    return counts
