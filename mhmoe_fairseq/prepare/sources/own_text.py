"""The user's own text: plain files and JSON lines, in English or by language, and TorchScale's raw shards.

By language it is ``DIR/de.txt`` and ``DIR/de/*.txt``, or ``.jsonl`` in place of ``.txt``. Every file may be ``.gz``.
"""

import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence, TypedDict

from ...common.arguments import nonempty
from ...common.errors import UserError
from ...common.files import read_json, read_json_lines, read_utf8_lines, require_files
from ...data.documents import Document
from ..archives import Say
from .base import (
    DOMAINS,
    ENGLISH_SOURCES,
    FILES,
    MULTILINGUAL_SOURCES,
    ONE_FOLDER,
    MultilingualCorpus,
    OpenedText,
    Passage,
    Source,
    SourceKind,
    Stage,
    fingerprint,
    tell_left_out,
    walk_files,
)  # fmt: skip

BLANK_LINE, WHOLE_FILE, EACH_LINE = "blank-line", "file", "line"
_DOMAIN, _ENDING = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*"), re.compile(r"\.(txt|jsonl)(\.gz)?$")
_LICENCE = "the user's own text: its terms are the user's to know"


class Placed(TypedDict, total=False):
    """What all documents of a file are of."""

    split: str
    domain: str


@dataclass(frozen=True)
class OwnText(Source):
    """English files of the user, each with what its documents are of (``split``, ``domain``); nothing is fetched."""

    name: str
    unit: str
    files: Sequence[tuple[Placed, Path]]
    read: Callable[[Path], Iterator[Document]]
    options: Mapping[str, Any] = field(default_factory=dict)
    licence: str = _LICENCE
    unread: Sequence[tuple[str, str]] = ()  # name and reason

    def identity(self) -> dict[str, object]:
        """Returns the files' names, sizes and hashes by domain; ``UserError`` if one is missing, or of two domains."""
        require_files([path for _, path in self.files], f"--source {self.name}")
        inputs: dict[str, list[dict[str, object]]] = {}
        owners: dict[object, str] = {}
        for of, path in self.files:
            domain = of.get("domain", "")
            inputs.setdefault(domain, []).append(fingerprint(path))
            if (owner := owners.setdefault(inputs[domain][-1]["sha256"], domain)) != domain:
                raise UserError(
                    f"--source {self.name}: {path} is text of {owner} and of {domain}, and would stay in {owner} alone"
                )
        return {"inputs": inputs.get("", inputs)}

    def open(self, cache_dir: Path, say: Say) -> OpenedText:
        """Returns the identity and the documents, file by file; says what is not read."""
        documents = (document._replace(**of) for of, path in self.files for document in self.read(path))
        left_out = {"left_out": tell_left_out(self.name, self.unread, say)} if self.unread else {}
        return {"version": None, **self.identity(), **left_out}, documents


def text_source(files: Sequence[Path], separator: str = BLANK_LINE) -> OwnText:
    """Returns a source of plain UTF-8 files, divided as by :func:`text_documents`."""
    unit, read = f"document separator = {separator}, line = line", partial(text_documents, separator=separator)
    return OwnText("text", unit, [({}, file) for file in files], read, {"document_separator": separator})


def jsonl_source(files: Sequence[Path], field: str = "text") -> OwnText:
    """Returns a source of JSON lines: one object a line, the document in one of its fields."""
    unit, read = "document = JSON object, line = line of its text", partial(jsonl_documents, field=field)
    return OwnText("jsonl", unit, [({}, file) for file in files], read, {"jsonl_field": field})


def shard_source(folder: Path) -> OwnText:
    """Returns a source of TorchScale's raw layout: ``json/{train,valid}.json`` (and ``test.json`` if there).

    Each JSON file is a list of objects with ``source``: paths of shards, relative to the folder. A shard has one
    sentence a line and an empty line between documents. The splits are kept as they are; ``weight`` is ignored, because
    every shard is read once. Held-out splits are read first, so that a repeated line is dropped from the training part.
    """
    indexes = {split: folder / "json" / f"{split}.json" for split in ("test", "valid", "train")}
    require_files([indexes["valid"], indexes["train"]], "--source torchscale-shards")
    present = {split: index for split, index in indexes.items() if index.exists()}
    shards: list[tuple[Placed, Path]] = [
        ({"split": split}, folder / name) for split, index in present.items() for name in _shard_names(index)
    ]
    unit, read = "document separator = blank-line, line = line", partial(text_documents, separator=BLANK_LINE)
    return OwnText("torchscale-shards", unit, shards, read)


def domain_source(words: Sequence[str], separator: str = BLANK_LINE, field: str = "text") -> OwnText:
    """Returns a source of several domains, each from a file or a folder: ``NAME=PATH``; one name may have several.

    A file whose name ends in ``.jsonl`` or ``.jsonl.gz`` is read as by :func:`jsonl_source`, any other as by
    :func:`text_source`; of a folder what ends so or in ``.txt`` or ``.txt.gz``, and what lies below it.

    Raises:
        UserError: fewer than two domains, a bad word or name, or a folder without such a file.
    """
    files: list[tuple[Placed, Path]] = []
    unread: list[tuple[str, str]] = []
    for word in words:
        name, separated, path = word.partition("=")
        if not (separated and path and _DOMAIN.fullmatch(name)):
            rule = "must be NAME=PATH, the name of letters without accents, digits, - and _"
            raise UserError(f"--source domains {word}: {rule}, such as law=texts/law")
        inside = [*walk_files(Path(path))] if Path(path).is_dir() else []
        found = [file for file in inside if _ENDING.search(file.name)] if inside else [Path(path)]
        if Path(path).is_dir() and not (inside and found):
            raise UserError(f"--source domains {word}: no file in that folder ends in .txt or .jsonl, or these and .gz")
        files += (({"domain": name}, file) for file in found)
        others = {*inside} - {*found}
        unread += ((str(file), "ends in neither .txt nor .jsonl") for file in inside if file in others)
    if len({of["domain"] for of, _ in files}) < 2:
        raise UserError(f"--source domains: needs two domains, got {' '.join(words)} (one alone: --source text)")

    def read(path: Path) -> Iterator[Document]:
        is_json = path.name.removesuffix(".gz").endswith(".jsonl")
        return jsonl_documents(path, field) if is_json else text_documents(path, separator)

    unit = f"document separator = {separator}, or document = JSON object; each domain split for itself, then shuffled"
    options = {"document_separator": separator, "jsonl_field": field}
    return OwnText("domains", unit, files, read, options, unread=unread)


def _shard_names(index: Path) -> list[str]:
    """Returns the shards of one JSON file; ``UserError`` when it is not a list of objects with a ``source`` list."""
    entries = read_json(index)
    try:
        sources: list[Any] = [entry["source"] for entry in entries] if isinstance(entries, list) else [None]
    except (TypeError, KeyError):
        sources = [None]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in sources):
        raise UserError(f"{index}: must be a list of objects, each with a list of shard paths under 'source'")
    return [name for names in sources for name in names]


def text_documents(path: Path, separator: str) -> Iterator[Document]:
    """Yields the documents of one text file.

    Args:
        separator: ``blank-line``, ``file`` (the file is one document), ``line`` (each line is one), or the text of a
            line that separates documents.
    """
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
    """Yields ``file:line`` and object of every non-empty line; ``UserError`` if one has no string in ``field``."""
    for location, record in read_json_lines(path):
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            raise UserError(f"{location}: needs an object with a string in the field {field!r} (--jsonl-field)")
        if any("\ud800" <= character <= "\udfff" for character in record[field]):
            raise UserError(f"{location}: the field {field!r} has half a surrogate pair, which UTF-8 cannot write")
        yield location, record


@dataclass(frozen=True)
class LanguageFolder:
    """One file, one folder of files, or both per language.

    Args:
        ending: of the files' names, without ``.gz``.
        read: from a file and its name to passages.
        options: flags that change what is read, for the identity.
    """

    name: str
    ending: str
    folder: Path
    read: Callable[[Path, str], Iterator[Passage]]
    options: Mapping[str, Any]
    filter_lines: bool = False

    def _patterns(self, code: str) -> list[str]:
        return [f"{start}.{self.ending}{packed}" for start in (code, f"{code}/*") for packed in ("", ".gz")]

    def files(self, code: str) -> list[Path]:
        """Returns the files of one language, pattern by pattern and by name; ``UserError`` when there is none."""
        found = [path for pattern in self._patterns(code) for path in sorted(self.folder.glob(pattern))]
        if not found:
            looked = ", ".join(str(self.folder / pattern) for pattern in self._patterns(code))
            raise UserError(f"--source {self.name}: no data for the language {code}: none of {looked}")
        require_files(found, f"--source {self.name}")
        return found

    def identity(self, languages: Sequence[str]) -> dict[str, object]:
        """Returns the files by language; ``UserError`` if one is not UTF-8, or two languages have the same text."""
        if not self.folder.is_dir():
            raise UserError(f"--source {self.name} {self.folder}: no such folder")
        files = [(code, path) for code in languages for path in self.files(code)]
        inputs: dict[str, list[dict[str, object]]] = {code: [] for code in languages}
        owners: dict[object, tuple[str, Path]] = {}
        for code, path in files:
            inputs[code].append(fingerprint(path))
            owner, other = owners.setdefault(inputs[code][-1]["sha256"], (code, path))
            if owner != code:
                raise UserError(
                    f"--source {self.name}: {other} ({owner}) and {path} ({code}) are the same text; every "
                    "language needs its own"
                )
            for _ in read_utf8_lines(path):
                pass
        return {"inputs": inputs, **self.options}

    def now_available(self, provenance: Mapping[str, Any], cache_dir: Path) -> list[str]:
        """Returns nothing: all is there."""
        return []

    def _unread(self, languages: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Yields what lies where the languages' files do and is not read, with the reason."""
        for code in languages:
            read = set(self.files(code))
            for path in [*sorted(self.folder.glob(f"{code}.*")), *walk_files(self.folder / code)]:
                if path not in read:
                    yield path.relative_to(self.folder).as_posix(), f"not one of {', '.join(self._patterns(code))}"

    def open(
        self, languages: Sequence[str], folder: Path, stage: Stage, cache_dir: Path, say: Say
    ) -> MultilingualCorpus:
        """Returns the corpus; nothing is fetched or copied."""
        return MultilingualCorpus(
            provenance={"licence": _LICENCE, "left_out": tell_left_out(self.name, self._unread(languages), say)},
            sources={code: [path.name for path in self.files(code)] for code in languages},
            missing={code: {} for code in languages},
            passages=lambda code: self._passages(code) if code in languages else iter(()),
        )

    def _passages(self, code: str) -> Iterator[tuple[str, Passage]]:
        names: set[str] = set()
        for path in self.files(code):
            stem = path.name.removesuffix(".gz").rsplit(".", 1)[0]
            name = "" if stem == code else stem
            if name in names:  # a packed file beside a plain one: their documents must not be taken for one
                name = path.relative_to(self.folder).as_posix()
            names.add(name)
            for passage in self.read(path, name):
                yield self.name, passage


def text_folder(folder: Path, separator: str) -> LanguageFolder:
    """Returns a source of plain text, documents apart by ``separator`` lines. They have no key: nothing is aligned."""

    def read(path: Path, name: str) -> Iterator[Passage]:
        for number, document in enumerate(text_documents(path, separator), start=1):
            yield Passage(f"{name}:{number}", f"{name}:{number}", document.lines)

    return LanguageFolder("text", "txt", folder, read, {"document_separator": separator})


def jsonl_folder(folder: Path, field: str, key_field: str) -> LanguageFolder:
    """Returns a source of JSON lines: an object is a document, one key in several languages a translation."""

    def read(path: Path, name: str) -> Iterator[Passage]:
        for number, (location, record) in enumerate(jsonl_records(path, field), start=1):
            key = record.get(key_field)
            if key is not None and not isinstance(key, (str, int)):
                raise UserError(f"{location}: the key in {key_field!r} must be text or a number (--jsonl-key-field)")
            unit = f"{name}:{number}" if key is None else str(key)
            yield Passage(unit, unit, record[field].splitlines(), None if key is None else unit)

    return LanguageFolder("jsonl", "jsonl", folder, read, {"jsonl_field": field, "jsonl_key_field": key_field})


_SEPARATOR = {
    "type": nonempty, "default": BLANK_LINE, "metavar": "SEP",
    "help": "for text: blank-line, file (a file is a document), line (a line is one), or the text of a separator line",
}  # fmt: skip
_FIELD = {"type": nonempty, "default": "text", "metavar": "NAME", "help": "field that holds a document's text"}
_KEY = {
    "type": nonempty, "default": "key", "metavar": "NAME",
    "help": "field that names a document alike in all languages; documents without it are not aligned",
}  # fmt: skip
ENGLISH_SOURCES["text"] = SourceKind(
    lambda args, *files: text_source(files, args.document_separator), FILES, flags={"--document-separator": _SEPARATOR}
)
ENGLISH_SOURCES["jsonl"] = SourceKind(
    lambda args, *files: jsonl_source(files, args.jsonl_field), FILES, flags={"--jsonl-field": _FIELD}
)
ENGLISH_SOURCES["domains"] = SourceKind(
    lambda args, *words: domain_source([*map(str, words)], args.document_separator, args.jsonl_field), DOMAINS,
    "(a file or folder for each domain, evaluated one by one)",
    {"--document-separator": _SEPARATOR, "--jsonl-field": _FIELD},
)  # fmt: skip
ENGLISH_SOURCES["torchscale-shards"] = SourceKind(lambda args, folder: shard_source(folder), ONE_FOLDER)
MULTILINGUAL_SOURCES["text"] = SourceKind(
    lambda args, folder: text_folder(folder, args.document_separator), ONE_FOLDER, "(with DIR/de.txt or DIR/de/*.txt)",
    {"--document-separator": _SEPARATOR},
)  # fmt: skip
MULTILINGUAL_SOURCES["jsonl"] = SourceKind(
    lambda args, folder: jsonl_folder(folder, args.jsonl_field, args.jsonl_key_field), ONE_FOLDER,
    "(with DIR/de.jsonl or DIR/de/*.jsonl)", {"--jsonl-field": _FIELD, "--jsonl-key-field": _KEY},
)  # fmt: skip
