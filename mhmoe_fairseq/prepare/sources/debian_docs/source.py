"""Families of Debian packages as one corpus in many languages."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Iterator, Sequence

from ....common.errors import UserError
from ...archives import Archive, FetchedArchive, Say, fetch
from ...multilingual.corpus_source import MultilingualCorpus, Stage
from ...multilingual.passages import Passage, open_passages, read_passages
from .families import FAMILIES, Family

_INSTEAD = "choose other families (--debian-families)"


@dataclass(frozen=True)
class DebianDocs:
    """Translated documentation and messages out of Debian packages.

    Args:
        families: names out of :data:`~.families.FAMILIES`.
    """

    families: tuple[str, ...] = tuple(FAMILIES)
    name: str = "debian-docs"
    filter_lines: bool = True

    def identity(self, languages: Sequence[str]) -> dict[str, object]:
        """The families; their versions are what the suite has, and only recorded."""
        return {"families": list(self.families)}

    def open(
        self, languages: Sequence[str], folder: Path, stage: Stage, cache_dir: Path, say: Say
    ) -> MultilingualCorpus:
        """Fetches and extracts every family, one stage each, into ``folder``.

        English is extracted in any case: what is not translated is told by it.

        Raises:
            UserError: no package of any family can be had, or a package that the suite has cannot be fetched or read.
        """
        wanted = list(dict.fromkeys([*languages, "en"]))
        records: dict[str, dict[str, Any]] = {}
        for name in self.families:
            extraction = FamilyExtraction(FAMILIES[name], wanted, folder / name, cache_dir, say)
            outputs = [f"{folder.name}/{name}/{code}.jsonl" for code in wanted]
            records[name] = stage(f"extract {name}", outputs, extraction.run)
        if not any(record["packages"] for record in records.values()):
            raise UserError(
                "--source debian-docs: apt knows none of the packages; run apt-get update first, put the .deb files "
                "into --cache-dir, or choose another source (text DIR, jsonl DIR)"
            )
        return MultilingualCorpus(
            provenance={"families": records},
            sources={code: _sources(records, code) for code in languages},
            missing={code: _missing(records, code) for code in languages},
            passages=partial(_read, folder, self.families),
            has_english=True,
        )


def _sources(records: dict[str, dict[str, Any]], code: str) -> list[str]:
    return [name for name, record in records.items() if record["passages"].get(code)]


def _missing(records: dict[str, dict[str, Any]], code: str) -> dict[str, str]:
    """Family -> why this language has none of it."""
    missing = {}
    for name, record in records.items():
        if record["passages"].get(code):
            continue
        absent = [package for package in record["absent"] if code in FAMILIES[name].packages[package]]
        missing[name] = f"not in this suite: {', '.join(absent)}" if absent else "Debian has it in other languages only"
    return missing


def _read(folder: Path, families: Sequence[str], code: str) -> Iterator[tuple[str, Passage]]:
    for name in families:
        for passage in read_passages(folder / name / f"{code}.jsonl"):
            yield name, passage


class FamilyExtraction:
    """One family: its packages fetched, and its passages written by language."""

    def __init__(self, family: Family, languages: Sequence[str], folder: Path, cache_dir: Path, say: Say):
        self._family = family
        self._languages = languages
        self._folder = folder
        self._cache_dir = cache_dir
        self._say = say

    def run(self) -> dict[str, Any]:
        """Returns licence, packages with versions and hashes, absent packages, and passages by language."""
        fetched, absent = self._fetch()
        counts: Counter[str] = Counter()
        with contextlib.ExitStack() as stack:
            files = {code: self._folder / f"{code}.jsonl" for code in self._languages}
            sinks = {code: stack.enter_context(open_passages(file)) for code, file in files.items()}
            for archive, held in fetched:
                for code, passage in self._family.read(archive.path, held):
                    sinks[code](passage)
                    counts[code] += 1
        self._say(f"extract: {self._family.name} ({self._family.summary}): {sum(counts.values())} passages")
        return {
            "licence": self._family.licence,
            "packages": [archive.provenance() for archive, _ in fetched],
            "absent": absent,
            "passages": dict(counts),
        }

    def _fetch(self) -> tuple[list[tuple[FetchedArchive, tuple[str, ...]]], list[str]]:
        fetched, absent = [], []
        for package, held in self._family.packages_for(self._languages).items():
            archive = Archive("apt-get", package, None, f"{package}_*.deb", instead=_INSTEAD)
            if any(self._cache_dir.glob(archive.filename)) or suite_has(package):
                fetched.append((fetch(archive, self._cache_dir, self._say), held))
            else:
                absent.append(package)
        return fetched, absent


def suite_has(package: str) -> bool:
    """Whether apt knows the package; ``UserError`` without apt."""
    if shutil.which("apt-cache") is None:
        raise UserError(
            f"--source debian-docs: {package} is fetched with apt-get, which is not installed here; put "
            f"{package}_*.deb into --cache-dir, or choose another source (text DIR, jsonl DIR)"
        )
    shown = subprocess.run(["apt-cache", "show", "--no-all-versions", package], capture_output=True, text=True)
    return shown.returncode == 0 and bool(shown.stdout.strip())
