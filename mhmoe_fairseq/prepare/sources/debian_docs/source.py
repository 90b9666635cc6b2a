"""Families of Debian packages as one corpus in many languages."""

import argparse
import contextlib
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Iterator, Sequence

from ....common.arguments import nonempty
from ....common.errors import UserError
from ...archives import Archive, FetchedArchive, Say, fetch
from ...multilingual.passages import MultilingualCorpus, Passage, Stage, open_passages, read_passages
from ..base import MULTILINGUAL_SOURCES, SourceKind
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
        """Returns the families; their versions are what the suite has, and only recorded."""
        return {"families": list(self.families)}

    def open(
        self, languages: Sequence[str], folder: Path, stage: Stage, cache_dir: Path, say: Say
    ) -> MultilingualCorpus:
        """Fetches and extracts every family, one stage each, into ``folder``.

        English is extracted in any case: it tells what is not translated.

        Raises:
            UserError: no package of any family can be had, or a package that the suite has cannot be fetched or read.
        """
        wanted = list(dict.fromkeys([*languages, "en"]))
        records: dict[str, dict[str, Any]] = {}
        for name in self.families:
            outputs = [f"{folder.name}/{name}/{code}.jsonl" for code in wanted]
            extract = partial(_extract, FAMILIES[name], wanted, folder / name, cache_dir, say)
            records[name] = stage(f"extract {name}", outputs, extract)
        if not any(record["packages"] for record in records.values()):
            raise UserError(
                "--source debian-docs: apt knows none of the packages; run apt-get update first, put the .deb files "
                "into --cache-dir, or choose another source (text DIR, jsonl DIR)"
            )
        missing = {code: _missing(records, code) for code in languages}
        return MultilingualCorpus(
            provenance={"families": records},
            sources={code: [name for name in self.families if name not in missing[code]] for code in languages},
            missing=missing,
            passages=partial(_read, folder, self.families),
            has_english=True,
        )


def _missing(records: dict[str, dict[str, Any]], code: str) -> dict[str, str]:
    """Returns why a language has none of a family, by family."""
    missing = {}
    for name, record in records.items():
        if not record["passages"].get(code):
            absent = [package for package in record["absent"] if code in FAMILIES[name].packages[package]]
            reason = f"not in this suite: {', '.join(absent)}" if absent else "Debian has it in other languages only"
            missing[name] = reason
    return missing


def _read(folder: Path, families: Sequence[str], code: str) -> Iterator[tuple[str, Passage]]:
    for name in families:
        for passage in read_passages(folder / name / f"{code}.jsonl"):
            yield name, passage


def _extract(family: Family, languages: Sequence[str], folder: Path, cache_dir: Path, say: Say) -> dict[str, Any]:
    """Writes a family's passages by language; returns its packages with versions and hashes, and counts."""
    fetched, absent = _fetch(family, languages, cache_dir, say)
    counts: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        write = {code: stack.enter_context(open_passages(folder / f"{code}.jsonl")) for code in languages}
        for archive, held in fetched:
            for code, passage in family.read(archive.path, held):
                write[code](passage)
                counts[code] += 1
    say(f"extract: {family.name} ({family.summary}): {sum(counts.values())} passages")
    packages = [archive.provenance() for archive, _ in fetched]
    return {"licence": family.licence, "packages": packages, "absent": absent, "passages": dict(counts)}


def _fetch(
    family: Family, languages: Sequence[str], cache_dir: Path, say: Say
) -> tuple[list[tuple[FetchedArchive, tuple[str, ...]]], list[str]]:
    """Returns the packages that there are, with the languages they hold, and the names of those that there are not."""
    fetched, absent = [], []
    for package, held in family.packages_for(languages).items():
        archive = Archive("apt-get", package, None, f"{package}_*.deb", instead=_INSTEAD)
        if any(cache_dir.glob(archive.filename)) or suite_has(package):
            fetched.append((fetch(archive, cache_dir, say), held))
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


def _build(args: argparse.Namespace) -> DebianDocs:
    for family in args.debian_families:
        if family not in FAMILIES:
            raise UserError(f"--debian-families {family}: must be one of {', '.join(FAMILIES)}")
    return DebianDocs(tuple(family for family in FAMILIES if family in args.debian_families))


_NAMES = {
    "type": nonempty, "nargs": "+", "default": list(FAMILIES), "metavar": "NAME",
    "help": f"for debian-docs: which of {', '.join(FAMILIES)}",
}  # fmt: skip
MULTILINGUAL_SOURCES["debian-docs"] = SourceKind(_build, flags={"--debian-families": _NAMES})
