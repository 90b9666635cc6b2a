"""Passages: the pieces of text that sources of many languages yield, their files, and those that are translations."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Optional, Sequence

from ...common.files import atomic_open, json_line

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
    """A source that is ready to be read: what its ``open(languages, folder, stage, cache_dir, say)`` returns.

    Besides a ``name`` a source has ``filter_lines``, whether lines in other scripts and untranslated English are
    removed unless the user says otherwise, and ``identity(languages)``, what makes two preparations differ, without
    fetching. ``open`` may keep files in ``folder``, made by stages that are not repeated.

    Args:
        provenance: what the manifest says about it.
        sources: language -> where its text is from.
        missing: language -> what it lacks -> why.
        passages: from a language's code to ``(family, passage)`` pairs in a fixed order; none without English.
    """

    provenance: dict[str, Any]
    sources: Mapping[str, Sequence[str]]
    missing: Mapping[str, Mapping[str, str]]
    passages: Callable[[str], Iterator[tuple[str, Passage]]]


def passage_line(passage: Passage) -> bytes:
    """Returns a passage as a line of a file; half a surrogate pair, which UTF-8 cannot write, becomes ``?``."""
    return (json.dumps(passage, ensure_ascii=False) + "\n").encode("utf-8", "replace")


def write_passages(passages: Iterable[Passage], path: Path) -> None:
    """Writes all of ``passages`` to ``path``, atomically."""
    with atomic_open(path) as stream:
        stream.writelines(map(passage_line, passages))


def read_passages(path: Path) -> Iterator[Passage]:
    """Yields what :func:`write_passages` wrote, in order."""
    with open(path, encoding="utf-8", newline="\n") as stream:
        for line in stream:
            yield Passage(*json.loads(line))


def write_aligned(files: Mapping[str, Path], target: Path) -> dict[str, int]:
    """Writes ``{"key": ..., "text": {"en": ..., "de": ...}}`` for every key that two languages or more have.

    Args:
        files: language -> passages that have keys.

    Returns:
        how many keys there are (``keys``), and how many each language has.
    """
    texts: dict[str, dict[str, str]] = {}
    for code, file in files.items():
        for passage in read_passages(file):
            texts.setdefault(str(passage.key), {}).setdefault(code, " ".join(passage.lines))
    counts: Counter[str] = Counter()
    with atomic_open(target) as stream:
        for key in sorted(texts):
            if len(texts[key]) > 1:
                counts.update(["keys", *texts[key]])
                stream.write(json_line({"key": key, "text": texts[key]}))
    return dict(counts)
