"""What a source of text in many languages offers to the preparation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Protocol, Sequence

from ..archives import Say
from .passages import Passage

Stage = Callable[[str, list[str], Callable[[], Any]], Any]


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
    """A corpus in many languages by name."""

    @property
    def name(self) -> str: ...

    @property
    def filter_lines(self) -> bool:
        """Whether lines in other scripts and untranslated English are removed unless the user says otherwise."""
        ...

    def identity(self, languages: Sequence[str]) -> dict[str, object]:
        """What makes two preparations differ; checks what can be checked without fetching."""
        ...

    def open(
        self, languages: Sequence[str], folder: Path, stage: Stage, cache_dir: Path, say: Say
    ) -> MultilingualCorpus:
        """Fetches what is needed; may keep files in ``folder``, made by stages that are not repeated."""
        ...
