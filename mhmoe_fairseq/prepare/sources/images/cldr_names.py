"""CLDR's annotations as npm has them: the name and the keywords of characters, in many languages."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Mapping, Optional, Sequence

from ....common.errors import UserError
from ....data.documents import clean_line
from ...archives import Archive, FetchedArchive, iter_tar_members

VARIATION = "\ufe0f"
VERSION = "48.2.0"
_INSTEAD = "choose another source (folder DIR needs no download)"
ANNOTATIONS = Archive(
    "npm", "cldr-annotations-full", VERSION, f"cldr-annotations-full-{VERSION}.tgz",
    "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1", _INSTEAD,
)  # fmt: skip
DERIVED = Archive(
    "npm", "cldr-annotations-derived-full", VERSION, f"cldr-annotations-derived-full-{VERSION}.tgz",
    "4be946ff5815f806ec78b50363d577a769f2fbfb90c6380a44e161a92436996e", _INSTEAD,
)  # fmt: skip


@dataclass(frozen=True)
class Annotation:
    """A character's name and keywords in one language."""

    name: str
    keywords: tuple[str, ...]


class Names:
    """The annotations of one language."""

    def __init__(self, entries: Mapping[str, Annotation]):
        self.entries = entries

    def find(self, characters: str) -> Optional[Annotation]:
        """The annotation of a character sequence, written with or without variation selectors."""
        return self.entries.get(characters) or self.entries.get(characters.replace(VARIATION, ""))


def read_names(annotations: FetchedArchive, derived: FetchedArchive, languages: Sequence[str]) -> dict[str, Names]:
    """Names by language.

    Raises:
        UserError: CLDR does not have a language, or an archive is damaged.
    """
    found: dict[str, dict[str, Annotation]] = {language: {} for language in languages}
    for archive, key in ((annotations, "annotations"), (derived, "annotationsDerived")):
        members = {f"package/{key}/{language}/annotations.json": language for language in languages}
        for member, content in iter_tar_members(archive.path, members.__contains__):
            found[members[member]].update(_parse(content, key, f"{archive.path}: {member}"))
    for language, entries in found.items():
        if not entries:
            raise UserError(f"--langs {language}: CLDR {VERSION} has no names in it")
    return {language: Names(entries) for language, entries in found.items()}


def _parse(content: bytes, key: str, place: str) -> dict[str, Annotation]:
    try:
        rows = json.loads(content)[key]["annotations"]
        return {
            characters: Annotation(
                clean_line(row["tts"][0]), tuple(filter(None, map(clean_line, row.get("default", ()))))
            )
            for characters, row in rows.items()
            if row.get("tts")
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{place}: not CLDR's annotations ({error})") from error
