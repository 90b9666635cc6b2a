"""The user's own English text: plain files, JSON lines, and TorchScale's raw shards."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Optional, Sequence

from ...common.arguments import nonempty
from ...common.errors import UserError
from ...common.files import read_json, read_json_lines, read_utf8_lines, require_files
from ...data.documents import Document
from .base import ENGLISH_SOURCES, FILES, ONE_FOLDER, OWN_TEXT, OpenedSource, Say, SourceKind, fingerprint

BLANK_LINE, WHOLE_FILE, EACH_LINE = "blank-line", "file", "line"
SEPARATOR = {
    "type": nonempty, "default": BLANK_LINE, "metavar": "SEP",
    "help": "for text: blank-line, file (a file is a document), line (a line is one), or the text of a separator line",
}  # fmt: skip
FIELD = {"type": nonempty, "default": "text", "metavar": "NAME", "help": "field that holds a document's text"}


@dataclass(frozen=True)
class OwnText:
    """Files of the user, ``.gz`` too; nothing is fetched.

    Args:
        name, unit, options: see :class:`~.base.Source`.
        files: in the order in which they are read, each with the split that it must go to, if any.
        read: from a file to its documents.
    """

    name: str
    unit: str
    options: Mapping[str, Any]
    files: Sequence[tuple[Optional[str], Path]]
    read: Callable[[Path], Iterator[Document]]
    licence: str = OWN_TEXT

    def identity(self) -> dict[str, object]:
        """Returns the files' names, sizes and hashes; ``UserError`` names one that is missing."""
        paths = [path for _, path in self.files]
        require_files(paths, f"--source {self.name}")
        return {"inputs": list(map(fingerprint, paths))}

    def open(self, cache_dir: Path, say: Say) -> OpenedSource:
        """Returns the documents, file by file."""
        documents = (document._replace(split=split) for split, path in self.files for document in self.read(path))
        return OpenedSource({"version": None, **self.identity()}, documents)


def text_source(files: Sequence[Path], separator: str = BLANK_LINE) -> OwnText:
    """Returns a source of plain UTF-8 files.

    Args:
        separator: ``blank-line``, ``file`` (each file is one document), ``line`` (each line is one), or the
            text of a line that separates documents.
    """
    read = partial(text_documents, separator=separator)
    unit = f"document separator = {separator}, line = line"
    return OwnText("text", unit, {"document_separator": separator}, [(None, file) for file in files], read)


def jsonl_source(files: Sequence[Path], field: str = "text") -> OwnText:
    """Returns a source of JSON lines: one object a line, the document in one of its fields."""
    unit = "document = JSON object, line = line of its text"
    read = partial(jsonl_documents, field=field)
    return OwnText("jsonl", unit, {"jsonl_field": field}, [(None, file) for file in files], read)


def shard_source(folder: Path) -> OwnText:
    """Returns a source of TorchScale's raw layout: ``json/{train,valid}.json`` (and ``test.json`` if there).

    Each JSON file is a list of objects with ``source``: paths of shards, relative to the folder. A shard has one
    sentence a line and an empty line between documents. The splits are kept as they are; ``weight`` is ignored, because
    every shard is read once. Held-out splits are read first, so that a repeated line is dropped from the training part.
    """
    indexes = {split: folder / "json" / f"{split}.json" for split in ("test", "valid", "train")}
    require_files([indexes["valid"], indexes["train"]], "--source torchscale-shards")
    shards = [
        (split, folder / shard)
        for split, index in indexes.items()
        if index.exists()
        for shard in _shard_names(index, read_json(index))
    ]
    unit = "document separator = blank-line, line = line"
    return OwnText("torchscale-shards", unit, {}, shards, partial(text_documents, separator=BLANK_LINE))


def _shard_names(index: Path, entries: Any) -> list[str]:
    """Returns the shards of one JSON file; ``UserError`` when it is not a list of objects with a ``source`` list."""
    names: list[str] = []
    for entry in entries if isinstance(entries, list) else [None]:
        sources = entry.get("source") if isinstance(entry, dict) else None
        if not isinstance(sources, list) or not all(isinstance(name, str) for name in sources):
            raise UserError(f"{index}: must be a list of objects, each with a list of shard paths under 'source'")
        names.extend(sources)
    return names


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
        elif line.strip() != boundary:
            lines.append(line)
        elif lines:
            yield Document(f"{path}:{number}", lines)
            lines = []
    if lines:
        yield Document(str(path), lines)


def jsonl_documents(path: Path, field: str) -> Iterator[Document]:
    """Yields one document per non-empty line; ``UserError`` as in :func:`jsonl_records`."""
    for location, record in jsonl_records(path, field):
        yield Document(location, record[field].splitlines())


def jsonl_records(path: Path, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ``file:line`` and the object of every non-empty line.

    Raises:
        UserError: a line is not a JSON object with a string in ``field`` (names file:line).
    """
    for location, record in read_json_lines(path):
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            raise UserError(f"{location}: needs an object with a string in the field {field!r} (--jsonl-field)")
        if any("\ud800" <= character <= "\udfff" for character in record[field]):
            raise UserError(f"{location}: the field {field!r} has half a surrogate pair, which UTF-8 cannot write")
        yield location, record


ENGLISH_SOURCES["text"] = SourceKind(
    lambda args, *files: text_source(files, args.document_separator), FILES, flags={"--document-separator": SEPARATOR}
)
ENGLISH_SOURCES["jsonl"] = SourceKind(
    lambda args, *files: jsonl_source(files, args.jsonl_field), FILES, flags={"--jsonl-field": FIELD}
)
ENGLISH_SOURCES["torchscale-shards"] = SourceKind(lambda args, folder: shard_source(folder), ONE_FOLDER)
