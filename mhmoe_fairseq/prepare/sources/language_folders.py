"""The user's own text in many languages: ``DIR/de.txt`` and ``DIR/de/*.txt``, or ``DIR/de.jsonl`` (``.gz`` too)."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence

from ...common.arguments import nonempty
from ...common.errors import UserError
from ...common.files import read_utf8_lines, require_files
from ..archives import Say
from ..multilingual.passages import MultilingualCorpus, Passage, Stage
from .base import MULTILINGUAL_SOURCES, ONE_FOLDER, OWN_TEXT, SourceKind, fingerprint, tell_left_out, walk_files
from .own_text import FIELD, SEPARATOR, jsonl_records, text_documents


@dataclass(frozen=True)
class LanguageFolder:
    """One file, one folder of files, or both per language.

    Args:
        name: ``text`` or ``jsonl``.
        ending: of the files' names, without ``.gz``.
        folder: with the languages' files.
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
        end = self.ending
        return [f"{code}.{end}", f"{code}.{end}.gz", f"{code}/*.{end}", f"{code}/*.{end}.gz"]

    def files(self, code: str) -> list[Path]:
        """Returns the files of one language, pattern by pattern and by name; ``UserError`` when there is none."""
        found = [path for pattern in self._patterns(code) for path in sorted(self.folder.glob(pattern))]
        if not found:
            looked = ", ".join(str(self.folder / pattern) for pattern in self._patterns(code))
            raise UserError(f"--source {self.name}: no data for the language {code}: none of {looked}")
        require_files(found, f"--source {self.name}")
        return found

    def identity(self, languages: Sequence[str]) -> dict[str, object]:
        """Returns the files' names, sizes and hashes; all are read once to see that they are UTF-8.

        Raises:
            UserError: no such folder, a language without files, two languages with the same file, or invalid UTF-8.
        """
        if not self.folder.is_dir():
            raise UserError(f"--source {self.name} {self.folder}: no such folder")
        files = {code: self.files(code) for code in languages}
        inputs: dict[str, list[dict[str, object]]] = {code: [] for code in languages}
        owners: dict[object, tuple[str, Path]] = {}
        for code, path in ((code, path) for code, paths in files.items() for path in paths):
            entry = fingerprint(path)
            owner, other = owners.setdefault(entry["sha256"], (code, path))
            if owner != code:
                raise UserError(
                    f"--source {self.name}: {other} ({owner}) and {path} ({code}) are the same text; every "
                    "language needs its own"
                )
            for _ in read_utf8_lines(path):
                pass
            inputs[code].append(entry)
        return {"inputs": inputs, **self.options}

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
            provenance={"licence": OWN_TEXT, "left_out": tell_left_out(self.name, self._unread(languages), say)},
            sources={code: [path.name for path in self.files(code)] for code in languages},
            missing={code: {} for code in languages},
            passages=partial(self._passages, tuple(languages)),
            has_english="en" in languages,
        )

    def _passages(self, languages: Sequence[str], code: str) -> Iterator[tuple[str, Passage]]:
        names: set[str] = set()
        for path in self.files(code) if code in languages else []:
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
            yield Passage(unit, unit, record[field].splitlines(), None if key is None else str(key))

    return LanguageFolder("jsonl", "jsonl", folder, read, {"jsonl_field": field, "jsonl_key_field": key_field})


_KEY = {
    "type": nonempty, "default": "key", "metavar": "NAME",
    "help": "field that names a document alike in all languages; documents without it are not aligned",
}  # fmt: skip
MULTILINGUAL_SOURCES["text"] = SourceKind(
    lambda args, folder: text_folder(folder, args.document_separator), ONE_FOLDER, "(with DIR/de.txt or DIR/de/*.txt)",
    {"--document-separator": SEPARATOR},
)  # fmt: skip
MULTILINGUAL_SOURCES["jsonl"] = SourceKind(
    lambda args, folder: jsonl_folder(folder, args.jsonl_field, args.jsonl_key_field), ONE_FOLDER,
    "(with DIR/de.jsonl or DIR/de/*.jsonl)", {"--jsonl-field": FIELD, "--jsonl-key-field": _KEY},
)  # fmt: skip
