"""The user's own text in many languages: ``DIR/de.txt`` and ``DIR/de/*.txt``, or ``DIR/de.jsonl`` (``.gz`` too)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence

from ...common.errors import UserError
from ...common.files import read_utf8_lines, require_files, sha256_of
from ..archives import Say
from ..multilingual.corpus_source import MultilingualCorpus, Stage
from ..multilingual.passages import Passage
from .left_out import LeftOut, group_left_out, say_left_out, walk_files
from .local_files import jsonl_records, text_documents

_LICENCE = "the user's own text: its terms are the user's to know"
Read = Callable[[Path, str], Iterator[Passage]]


@dataclass(frozen=True)
class LanguageFolder:
    """One file, one folder of files, or both per language.

    Args:
        name: ``text`` or ``jsonl``.
        folder: with the languages' files.
        patterns: where they are, ``{}`` for the code; the files of all of them are read.
        read: from a file and its name to passages.
        options: flags that change what is read, for the identity.
    """

    name: str
    folder: Path
    patterns: tuple[str, ...]
    read: Read
    options: Mapping[str, Any]
    filter_lines: bool = False

    def files(self, code: str) -> list[Path]:
        """The files of one language, pattern by pattern and by name; ``UserError`` when there is none."""
        found = [path for pattern in self.patterns for path in sorted(self.folder.glob(pattern.format(code)))]
        if found:
            require_files(found, f"--source {self.name}")
            return found
        looked = ", ".join(str(self.folder / pattern.format(code)) for pattern in self.patterns)
        raise UserError(f"--source {self.name}: no data for the language {code}: none of {looked}")

    def identity(self, languages: Sequence[str]) -> dict[str, object]:
        """The files' names, sizes and hashes, all of which are read once to see that they are UTF-8.

        Raises:
            UserError: no such folder, a language without files, two languages with the same file, or invalid UTF-8.
        """
        if not self.folder.is_dir():
            raise UserError(f"--source {self.name} {self.folder}: no such folder")
        files = {code: self.files(code) for code in languages}
        inputs: dict[str, list[dict[str, object]]] = {code: [] for code in languages}
        owners: dict[object, tuple[str, Path]] = {}
        for code, paths in files.items():
            for path in paths:
                digest = sha256_of(path)
                owner, other = owners.setdefault(digest, (code, path))
                if owner != code:
                    raise UserError(
                        f"--source {self.name}: {other} ({owner}) and {path} ({code}) are the same text; every "
                        "language needs its own"
                    )
                for _ in read_utf8_lines(path):
                    pass
                inputs[code].append({"name": path.name, "bytes": path.stat().st_size, "sha256": digest})
        return {"inputs": inputs, **self.options}

    def left_out(self, languages: Sequence[str]) -> LeftOut:
        """What lies where the languages' files do and is not read."""
        reasons = []
        for code in languages:
            read = set(self.files(code))
            looked = ", ".join(pattern.format(code) for pattern in self.patterns)
            for path in [*sorted(self.folder.glob(f"{code}.*")), *walk_files(self.folder / code)]:
                if path not in read:
                    reasons.append((path.relative_to(self.folder).as_posix(), f"not one of {looked}"))
        return group_left_out(reasons)

    def open(
        self, languages: Sequence[str], folder: Path, stage: Stage, cache_dir: Path, say: Say
    ) -> MultilingualCorpus:
        """Nothing is fetched or copied."""
        left_out = self.left_out(languages)
        say_left_out(self.name, left_out, say)
        return MultilingualCorpus(
            provenance={"licence": _LICENCE, "left_out": left_out},
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
    """Plain text; a document is what stands between two ``separator`` lines. It has no key: nothing is aligned."""

    def read(path: Path, name: str) -> Iterator[Passage]:
        for number, document in enumerate(text_documents(path, separator), start=1):
            yield Passage(f"{name}:{number}", f"{name}:{number}", document.lines)

    patterns = ("{}.txt", "{}.txt.gz", "{}/*.txt", "{}/*.txt.gz")
    return LanguageFolder("text", folder, patterns, read, {"document_separator": separator})


def jsonl_folder(folder: Path, field: str, key_field: str) -> LanguageFolder:
    """JSON lines: one document an object; objects with the same key in several languages are translations."""

    def read(path: Path, name: str) -> Iterator[Passage]:
        for number, (place, record) in enumerate(jsonl_records(path, field), start=1):
            key = record.get(key_field)
            if key is not None and not isinstance(key, (str, int)):
                raise UserError(f"{place}: the key in {key_field!r} must be a string or a number (--jsonl-key-field)")
            unit = f"{name}:{number}" if key is None else str(key)
            yield Passage(unit, unit, record[field].splitlines(), None if key is None else str(key))

    patterns = ("{}.jsonl", "{}.jsonl.gz", "{}/*.jsonl", "{}/*.jsonl.gz")
    return LanguageFolder("jsonl", folder, patterns, read, {"jsonl_field": field, "jsonl_key_field": key_field})
