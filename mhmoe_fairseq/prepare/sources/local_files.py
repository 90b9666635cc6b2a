"""The user's own text: plain files, JSON lines, and TorchScale's raw shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator

from ...common.errors import UserError
from ...common.files import read_json, read_json_lines, read_utf8_lines, require_files, sha256_of
from ...data.documents import Document
from . import OpenedSource

BLANK_LINE, WHOLE_FILE, EACH_LINE = "blank-line", "file", "line"
_OWN = "the user's own text: its terms are the user's to know"


def _fingerprint(paths: list[Path]) -> list[dict[str, object]]:
    """Name, size and hash of each input, so that a changed file is noticed and a moved one is not."""
    return [{"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths]


@dataclass(frozen=True)
class TextSource:
    """Plain UTF-8 files (``.gz`` too).

    Args:
        files: at least one.
        separator: ``blank-line``, ``file`` (each file is one document), ``line`` (each line is one), or the
            text of a line that separates documents.
    """

    files: tuple[Path, ...]
    separator: str = BLANK_LINE
    name: str = "text"
    licence: str = _OWN

    @property
    def unit(self) -> str:
        """What a document and a line are."""
        return f"document separator = {self.separator}, line = line"

    def identity(self) -> dict[str, object]:
        """The files' names, sizes and hashes; ``UserError`` names one that is missing."""
        require_files(list(self.files), "--source text")
        return {"inputs": _fingerprint(list(self.files))}

    def open(self, cache_dir: Path, say: Callable[[str], None]) -> OpenedSource:
        """Reads the files in the order given; nothing is fetched."""
        documents = (document for path in self.files for document in text_documents(path, self.separator))
        return OpenedSource({"version": None, **self.identity()}, documents)


def text_documents(path: Path, separator: str) -> Iterator[Document]:
    """Yields the documents of one text file."""
    if separator == WHOLE_FILE:
        yield Document(str(path), list(read_utf8_lines(path)))
        return
    boundary = "" if separator == BLANK_LINE else separator.strip()
    lines: list[str] = []
    for number, line in enumerate(read_utf8_lines(path), start=1):
        if separator == EACH_LINE:
            yield Document(f"{path}:{number}", [line])
        elif line.strip() == boundary:
            if lines:
                yield Document(f"{path}:{number}", lines)
            lines = []
        else:
            lines.append(line)
    if lines:
        yield Document(str(path), lines)


@dataclass(frozen=True)
class JsonlSource:
    """JSON lines (``.gz`` too): one object a line, the document in one of its fields."""

    files: tuple[Path, ...]
    field: str = "text"
    name: str = "jsonl"
    licence: str = _OWN
    unit: str = "document = JSON object, line = line of its text"

    def identity(self) -> dict[str, object]:
        """The files' names, sizes and hashes; ``UserError`` names one that is missing."""
        require_files(list(self.files), "--source jsonl")
        return {"inputs": _fingerprint(list(self.files))}

    def open(self, cache_dir: Path, say: Callable[[str], None]) -> OpenedSource:
        """Reads the files in the order given; nothing is fetched."""
        documents = (document for path in self.files for document in jsonl_documents(path, self.field))
        return OpenedSource({"version": None, **self.identity()}, documents)


def jsonl_documents(path: Path, field: str) -> Iterator[Document]:
    """Yields one document per non-empty line; ``UserError`` as in :func:`jsonl_records`."""
    for place, record in jsonl_records(path, field):
        yield Document(place, record[field].splitlines())


def jsonl_records(path: Path, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ``file:line`` and the object of every non-empty line.

    Raises:
        UserError: a line is not a JSON object with a string in ``field`` (names file:line).
    """
    for place, record in read_json_lines(path):
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            raise UserError(f"{place}: needs an object with a string in the field {field!r} (--jsonl-field)")
        if any("\ud800" <= character <= "\udfff" for character in record[field]):
            raise UserError(f"{place}: the field {field!r} has half a surrogate pair, which UTF-8 cannot write")
        yield place, record


@dataclass(frozen=True)
class TorchscaleShardSource:
    """TorchScale's raw layout: ``json/{train,valid}.json`` (and ``test.json`` if there) name shards of plain text.

    Each JSON file is a list of objects with ``source``: shard paths relative to the folder. A shard has one sentence
    a line and an empty line between documents. The splits are kept as they are; ``weight`` is ignored, because every
    shard is read once. Held-out splits are read first, so that a repeated line is dropped from the training part.
    """

    folder: Path
    name: str = "torchscale-shards"
    licence: str = _OWN
    unit: str = "document separator = blank-line, line = line"

    def identity(self) -> dict[str, object]:
        """The shards' names, sizes and hashes; ``UserError`` names one that is missing."""
        return {"inputs": _fingerprint([path for _, path in self._shards()])}

    def open(self, cache_dir: Path, say: Callable[[str], None]) -> OpenedSource:
        """Reads the shards in the order of the JSON files; nothing is fetched."""
        documents = (
            document._replace(split=split)
            for split, path in self._shards()
            for document in text_documents(path, BLANK_LINE)
        )
        return OpenedSource({"version": None, **self.identity()}, documents)

    def _shards(self) -> list[tuple[str, Path]]:
        indices = {split: self.folder / "json" / f"{split}.json" for split in ("test", "valid", "train")}
        required = [path for split, path in indices.items() if split != "test"]
        require_files(required, "--source torchscale-shards")
        shards = [
            (split, self.folder / shard)
            for split, index in indices.items()
            if index.exists()
            for shard in _shard_names(index, read_json(index))
        ]
        require_files([path for _, path in shards], "--source torchscale-shards")
        return shards


def _shard_names(index: Path, entries: Any) -> list[str]:
    """The shard paths of one JSON file; ``UserError`` when it is not a list of objects with a ``source`` list."""
    names: list[str] = []
    for entry in entries if isinstance(entries, list) else [None]:
        sources = entry.get("source") if isinstance(entry, dict) else None
        if not isinstance(sources, list) or not all(isinstance(name, str) for name in sources):
            raise UserError(f"{index}: must be a list of objects, each with a list of shard paths under 'source'")
        names.extend(sources)
    return names
