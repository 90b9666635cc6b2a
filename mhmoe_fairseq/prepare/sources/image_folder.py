"""The user's own images: a folder, with captions in one file or beside each image.

Captions, where there are any, are in ``captions.jsonl`` (``{"image": "a/b.jpg", "caption": "...", "language": "en"}``;
a list of captions is fine, and the language may be left out), in ``captions.tsv`` (``a/b.jpg``, a tab, the caption), or
in ``b.txt`` beside ``b.jpg``, a caption per line. An image's first folder is its kind.
"""

import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Iterator, Mapping, Sequence

from ...common.errors import UserError
from ...common.files import read_json_lines, read_utf8_lines, sha256_of
from ...data.documents import clean_line
from ..archives import Say
from ..image_text.images import OpenedImages, file_image
from .base import IMAGE_SOURCES, ONE_FOLDER, SourceKind, tell_left_out, walk_files

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
_JSONL, _TSV = "captions.jsonl", "captions.tsv"


@dataclass(frozen=True)
class FolderSource:
    """Images in ``folder`` and below."""

    folder: Path
    name: str = "folder"
    licence: str = "the user's own images: their terms are the user's to know"

    def identity(self, languages: Sequence[str]) -> dict[str, object]:
        """Returns names and sizes of the images, and hashes of the captions: what a copy of the folder has too.

        Images are not read for it, so that one which is replaced by another of the same size goes unseen.

        Raises:
            UserError: no such folder, or no image in it.
        """
        sizes = {file: file.stat().st_size for file in self._files}
        texts = [self.folder / name for name in (_JSONL, _TSV)]
        captions = {text.name: sha256_of(text) for text in texts if text.is_file()}
        if beside := {text: sha256_of(text) for file in sizes if (text := file.with_suffix(".txt")).is_file()}:
            captions["beside pictures"] = self._digest(beside)
        return {  # by the names that finished folders know
            "pictures": len(sizes),
            "bytes": sum(sizes.values()),
            "names_and_sizes": self._digest(sizes),
            "captions": captions,
        }

    def open(self, languages: Sequence[str], folder: Path, cache_dir: Path, say: Say) -> OpenedImages:
        """Copies the images.

        Raises:
            UserError: naming file and line of a caption that is no good, or of an image that is not there.
        """
        left_out = tell_left_out(self.name, self._unread(), say)
        captions: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))  # by image and language
        for name, language, text in self._caption_lines(languages[0]):
            if cleaned := clean_line(text):
                captions[PurePosixPath(name).as_posix()][language].append(cleaned)
        unread = Counter(code for found in captions.values() for code in found if code not in languages)
        images = []
        for file in self._files:
            name = self._name(file)
            found = captions.pop(name, {})
            read = {language: found[language] for language in languages if language in found}
            english = " ".join(found.get("en", ()))
            images.append(file_image(folder, PurePosixPath(name), file.read_bytes(), read, english))
        if captions:
            raise UserError(f"--source folder {self.folder}: a caption is for {min(captions)}, which is not there")
        captioned = sum(bool(image.captions) for image in images)
        say(f"folder: {len(images)} images, {captioned} with a caption in {', '.join(languages)}")
        for code, count in unread.items():
            say(f"left out: folder: captions of {count} images in {code}, which --langs does not name")
        provenance = {
            "folder": self.folder.name, "captioned": captioned, "left_out": left_out,
            "captions_in_other_languages": dict(unread),
        }  # fmt: skip
        return OpenedImages(provenance, images)

    def _name(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()

    @cached_property
    def _files(self) -> list[Path]:
        if not self.folder.is_dir():
            raise UserError(f"--source folder {self.folder}: no such folder")
        files = sorted(file for file in walk_files(self.folder) if file.suffix.lower() in SUFFIXES and file.is_file())
        if not files:
            raise UserError(f"--source folder {self.folder}: has no image ({', '.join(SUFFIXES)})")
        return files

    def _unread(self) -> Iterator[tuple[str, str]]:
        """Yields what is neither an image nor captions, with the reason."""
        read = {self.folder / _JSONL, self.folder / _TSV}
        read.update(*((file, file.with_suffix(".txt")) for file in self._files))
        for file in walk_files(self.folder):
            if file in read:
                continue
            if file.suffix.lower() in SUFFIXES:
                reason = "a link that leads nowhere"
            elif file.name in (_JSONL, _TSV):
                reason = "captions are read at the top of the folder"
            elif file.suffix == ".txt":
                reason = "beside no image of that name"
            else:
                reason = f"not one of {', '.join(SUFFIXES)}"
            yield self._name(file), reason

    def _digest(self, values: Mapping[Path, object]) -> str:
        """Returns one hash over names relative to the folder, in their order, each with its value."""
        named = sorted((self._name(file), value) for file, value in values.items())
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()

    def _caption_lines(self, default_language: str) -> Iterator[tuple[str, str, str]]:
        """Yields image, language and caption."""
        for location, record in read_json_lines(self.folder / _JSONL) if (self.folder / _JSONL).is_file() else ():
            texts = record.get("caption") if isinstance(record, dict) else None
            texts = [texts] if isinstance(texts, str) else texts
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise UserError(f"{location}: needs an object with 'image', and 'caption': a text or a list of texts")
            if not isinstance(record.get("image"), str):
                raise UserError(f"{location}: needs the image's path in the field 'image'")
            for text in texts:
                yield record["image"], str(record.get("language", default_language)), text
        if (self.folder / _TSV).is_file():
            for number, line in enumerate(read_utf8_lines(self.folder / _TSV), start=1):
                name, tab, text = line.partition("\t")
                if line.strip() and not (tab and name and text.strip()):
                    raise UserError(f"{self.folder / _TSV}:{number}: must be an image, a tab and its caption")
                yield name, default_language, text
        for file in self._files:
            if (beside := file.with_suffix(".txt")).is_file():
                yield from ((self._name(file), default_language, line) for line in read_utf8_lines(beside))


IMAGE_SOURCES["folder"] = SourceKind(lambda args, folder: FolderSource(folder), ONE_FOLDER, "(images and captions)")
IMAGE_SOURCES["beit3-index"] = SourceKind(
    lambda args, folder: folder, ONE_FOLDER,  # see image_text.beit3_folder
    "(a folder of unilm's scripts, checked and completed in place)",
)  # fmt: skip
