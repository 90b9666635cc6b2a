"""Images of packages: Noto's emoji with CLDR's names, and Tux Paint's stamps with a sentence in many languages.

Of emoji there is one drawing per concept, so that a caption of a held-out drawing can only be put together where its
parts are known: person and occupation, colour and shape, skin tone. Those that differ in such a part are a family; a
drawing with all its skin tones is a unit, which is never divided.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Iterator, Mapping, Sequence

from ...common.errors import UserError
from ...data.documents import clean_line
from ..archives import Archive, Say, fetch, iter_deb_members, iter_tar_members
from ..image_text.images import COLOURS, IMAGES, OpenedImages, Sentence, SourceImage, colour_facts, file_image
from .base import IMAGE_SOURCES, SourceKind


def _npm(package: str, version: str, sha256: str) -> Archive:
    instead = "choose another source (folder DIR needs no download)"
    return Archive("npm", package, version, f"{package}-{version}.tgz", sha256, instead)


VERSION = "48.2.0"  # of CLDR
ARTWORK = _npm("emoji-datasource-google", "16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438")
ANNOTATIONS = _npm("cldr-annotations-full", VERSION, "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1")
DERIVED = _npm(
    "cldr-annotations-derived-full", VERSION, "4be946ff5815f806ec78b50363d577a769f2fbfb90c6380a44e161a92436996e"
)
STAMPS = Archive(
    "apt-get", "tuxpaint-stamps-default", None, "tuxpaint-stamps-default_*.deb",
    instead="choose another source (emoji needs npm, folder DIR no download)",
)  # fmt: skip
_STAMPS, _VARIANTS, _REGIONS = "./usr/share/tuxpaint/stamps/", ("_mirror", "_flip"), {"zh_CN": "zh", "pt_PT": "pt"}
_VARIATION = "\ufe0f"
_INDEX, _FOLDER = "package/emoji.json", "package/img/google/64/"
_TONES = frozenset(map(chr, range(0x1F3FB, 0x1F400)))
_NO_IMAGES_OF_THEIR_OWN = "Component"  # the skin tones by themselves

_PERSON = re.compile(r"(woman|man|person|women|men|people|girl|boy|child)\b")
_VARIED = re.compile(rf"\b({'|'.join(COLOURS)}|women|woman|men|man|person|people|small|medium|large|in|with)\b")


Names = dict[str, tuple[str, tuple[str, ...]]]  # in one language: by character its name and keywords


@dataclass(frozen=True)
class EmojiSource:
    """The default source of images: Noto's emoji, 64 x 64 pixels, with CLDR's names in any of its languages."""

    name: str = "emoji"
    licence: str = "images: Noto Emoji, Apache-2.0; index: emoji-datasource, MIT; names: Unicode CLDR, Unicode-3.0"

    def identity(self, languages: Sequence[str]) -> dict[str, object]:
        """Returns the versions of the packages."""
        return {archive.package: archive.version for archive in (ARTWORK, ANNOTATIONS, DERIVED)}

    def open(self, languages: Sequence[str], folder: Path, cache_dir: Path, say: Say) -> OpenedImages:
        """Fetches the three packages and writes the images as they are.

        Raises:
            UserError: a package that cannot be fetched or read, or a language that CLDR does not have.
        """
        archives = [fetch(archive, cache_dir, say) for archive in (ARTWORK, ANNOTATIONS, DERIVED)]
        artwork, plain, derived = (path for path, _ in archives)
        names = read_names({"annotations": plain, "annotationsDerived": derived}, [*languages, "en"])
        contents = dict(iter_tar_members(artwork, lambda name: name == _INDEX or name.startswith(_FOLDER)))
        drawings = list(_drawings(contents, artwork))
        images = [image for drawing in drawings if (image := _named(*drawing, names, languages)) is not None]
        (folder / IMAGES).mkdir(parents=True, exist_ok=True)
        for image in images:
            (folder / image.path).write_bytes(contents[_FOLDER + Path(image.path).name])
        sentences = [sentence for language in languages for sentence in _sentences(names[language])]
        packages = [provenance for _, provenance in archives]
        return OpenedImages({"packages": packages, "unnamed": len(drawings) - len(images)}, images, sentences)


def _drawings(contents: dict[str, bytes], origin: Path) -> Iterator[tuple[str, SourceImage]]:
    """Yields characters and image of every emoji that has one, its skin tones after it; they have no captions yet."""
    try:
        for row in json.loads(contents[_INDEX]):
            if row["category"] == _NO_IMAGES_OF_THEIR_OWN:
                continue
            for variant in (row, *row.get("skin_variations", {}).values()):
                if _FOLDER + variant["image"] in contents:
                    unit, kinds = _unit(_characters(row)), {"group": row["category"], "subgroup": row["subcategory"]}
                    yield _characters(variant), SourceImage(f"{IMAGES}/{variant['image']}", {}, unit, **kinds)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{origin}: {_INDEX} is not the index of emoji-datasource ({error})") from error


def _characters(row: dict[str, str]) -> str:
    return "".join(chr(int(code, 16)) for code in row["unified"].split("-"))


def _unit(characters: str) -> str:
    return "-".join(f"{ord(character):04x}" for character in characters if character not in {_VARIATION, *_TONES})


def _named(
    characters: str, drawing: SourceImage, names: Mapping[str, Names], languages: Sequence[str]
) -> SourceImage | None:
    """Returns the image with its captions; None where a language has no name for it."""
    bare = characters.replace(_VARIATION, "")  # CLDR writes them with or without it
    known = {language: of.get(characters) or of.get(bare) for language, of in names.items()}
    found = {language: name for language, name in known.items() if name is not None}
    if len(found) < len(known):
        return None
    name, keywords = found["en"]
    # The name without person, colour and size: ``woman firefighter`` and ``firefighter`` are one family.
    family = " ".join(_VARIED.sub(" ", name.split(":")[0]).split()) or drawing.subgroup
    captions = {language: [found[language][0]] for language in languages}
    return replace(drawing, captions=captions, family=family, keywords=keywords, facts=_facts(name))


def _facts(name: str) -> dict[str, str]:
    title, _, details = name.partition(": ")
    person = _PERSON.match(title)
    facts = {"person": person[1]} if person else colour_facts(title)
    tones = [part for part in details.split(", ") if part.endswith(" skin tone")]
    return {**facts, "tone": tones[0].removesuffix(" skin tone")} if len(tones) == 1 else facts


def _sentences(names: Names) -> Iterator[Sentence]:
    """Yields ``name: keyword, keyword`` of every character, also without an image; skin tones would repeat it."""
    for characters, (name, keywords) in names.items():
        if _TONES.isdisjoint(characters):
            others = ", ".join(keyword for keyword in keywords if keyword != name)
            yield Sentence(_unit(characters), f"{name}: {others}" if others else name)


def read_names(archives: Mapping[str, Path], languages: Sequence[str]) -> dict[str, Names]:
    """Returns CLDR's names by language from archives by the key under which their files have the names.

    Raises:
        UserError: CLDR does not have a language, or an archive is damaged.
    """
    found: dict[str, Names] = {language: {} for language in languages}
    for key, archive in archives.items():
        members = {f"package/{key}/{language}/annotations.json": language for language in languages}
        for member, content in iter_tar_members(archive, members.__contains__):
            try:
                for characters, row in json.loads(content)[key]["annotations"].items():
                    if row.get("tts"):
                        keywords = tuple(filter(None, map(clean_line, row.get("default", ()))))
                        found[members[member]][characters] = clean_line(row["tts"][0]), keywords
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{archive}: {member}: not CLDR's annotations ({error})") from error
    for language, entries in found.items():
        if not entries:
            raise UserError(f"--langs {language}: CLDR {VERSION} has no names in it")
    return found


@dataclass(frozen=True)
class TuxPaintSource:
    """About 750 drawings and photographs with captions such as ``A pair of blue jeans with patches.``

    Only PNG files are read; a third as many stamps are SVG drawings, which Pillow cannot draw.
    """

    name: str = "tuxpaint"
    licence: str = "GPL-2 (Tux Paint stamps; see the package's copyright file)"

    def identity(self, languages: Sequence[str]) -> dict[str, object]:
        """Returns the package; its version is what the Debian suite has, and only recorded."""
        return {"package": STAMPS.package}

    def open(self, languages: Sequence[str], folder: Path, cache_dir: Path, say: Say) -> OpenedImages:
        """Writes the stamps that have a caption in one of the languages; ``UserError`` if there is no package."""
        package, provenance = fetch(STAMPS, cache_dir, say)
        members = dict(iter_deb_members(package, _is_stamp))
        drawings = {name.removesuffix(".png"): content for name, content in members.items() if name.endswith(".png")}
        images = []
        for stem, content in drawings.items():
            texts = dict(_stamp_captions(members.get(f"{stem}.txt", b"")))
            captions = {language: [texts[language]] for language in languages if language in texts}
            if not captions:
                continue
            path = PurePosixPath(f"{stem}.png").relative_to(_STAMPS)
            keywords = tuple(dict.fromkeys(part.replace("_", " ") for part in path.parts[:-1]))
            images.append(file_image(folder, path, content, captions, texts.get("en", ""), keywords))
        return OpenedImages({**provenance, "without_caption": len(drawings) - len(images)}, images)


def _is_stamp(member: str) -> bool:
    stem, _, suffix = member.rpartition(".")
    return member.startswith(_STAMPS) and suffix in ("png", "txt") and not stem.endswith(_VARIANTS)


def _stamp_captions(content: bytes) -> Iterator[tuple[str, str]]:
    """Yields language and caption: English on the first line, then ``de.utf8=...``."""
    for number, line in enumerate(content.decode("utf-8", "replace").splitlines()):
        key, _, text = line.partition("=")
        code, is_utf8, _ = key.partition(".utf8")
        if number == 0:
            code, text = "en", line
        elif not is_utf8:
            continue
        if cleaned := clean_line(text):
            yield _REGIONS.get(code, code), cleaned


IMAGE_SOURCES["emoji"] = SourceKind(lambda args: EmojiSource())
IMAGE_SOURCES["tuxpaint"] = SourceKind(lambda args: TuxPaintSource())
