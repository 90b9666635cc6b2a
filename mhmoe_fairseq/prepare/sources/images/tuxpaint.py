"""Tux Paint's stamps out of its Debian package: drawings and photographs, each with a short sentence in many languages.

Only PNG files are read; a third as many stamps are SVG drawings, which Pillow cannot draw.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Iterator, Sequence

from ....data.documents import clean_line
from ...archives import Archive, Say, fetch, iter_deb_members
from ...image_text.images import IMAGES, OpenedImages, SourceImage, caption_sentences, colour_facts, kinds_by_folder
from ..base import IMAGE_SOURCES, SourceKind

STAMPS = Archive(
    "apt-get", "tuxpaint-stamps-default", None, "tuxpaint-stamps-default_*.deb",
    instead="choose another source (emoji needs npm, folder DIR no download)",
)  # fmt: skip
_ROOT = "./usr/share/tuxpaint/stamps/"
_VARIANTS = ("_mirror", "_flip")
_REGIONS = {"zh_CN": "zh", "pt_PT": "pt"}


@dataclass(frozen=True)
class TuxPaintSource:
    """About 750 images with captions such as ``A pair of blue jeans with patches.``"""

    name: str = "tuxpaint"
    licence: str = "GPL-2 (Tux Paint stamps; see the package's copyright file)"

    def identity(self, languages: Sequence[str]) -> dict[str, object]:
        """Returns the package; its version is what the Debian suite has, and only recorded."""
        return {"package": STAMPS.package}

    def open(self, languages: Sequence[str], folder: Path, cache_dir: Path, say: Say) -> OpenedImages:
        """Fetches the package and writes the stamps that have a caption in one of the languages.

        Raises:
            UserError: the package cannot be fetched or read.
        """
        fetched = fetch(STAMPS, cache_dir, say)
        members = dict(iter_deb_members(fetched.path, _is_wanted))
        drawings = {name.removesuffix(".png"): content for name, content in members.items() if name.endswith(".png")}
        images = []
        for stem, content in drawings.items():
            texts = dict(_captions(members.get(f"{stem}.txt", b"")))
            captions = {language: [texts[language]] for language in languages if language in texts}
            if not captions:
                continue
            path = PurePosixPath(f"{stem}.png").relative_to(_ROOT)
            image = SourceImage(
                f"{IMAGES}/{path}", captions, unit=hashlib.sha256(content).hexdigest()[:16],
                **kinds_by_folder(str(path)), facts=colour_facts(texts.get("en", "")),
                keywords=tuple(dict.fromkeys(folder.replace("_", " ") for folder in path.parts[:-1])),
            )  # fmt: skip
            (folder / image.path).parent.mkdir(parents=True, exist_ok=True)
            (folder / image.path).write_bytes(content)
            images.append(image)
        provenance = {**fetched.provenance(), "without_caption": len(drawings) - len(images)}
        return OpenedImages(provenance, images, caption_sentences(images))


def _is_wanted(member: str) -> bool:
    stem, _, suffix = member.rpartition(".")
    return member.startswith(_ROOT) and suffix in ("png", "txt") and not stem.endswith(_VARIANTS)


def _captions(content: bytes) -> Iterator[tuple[str, str]]:
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


IMAGE_SOURCES["tuxpaint"] = SourceKind(lambda args: TuxPaintSource())
