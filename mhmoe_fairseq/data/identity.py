"""Which data a figure belongs to: perplexities of different data are never put together."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..common.files import read_json, sha256_of

MANIFEST = "manifest.json"
_SPLIT_FILES = ("train.bin", "valid.bin", "test.bin")
# A folder of images and text: what pre-training reads, but the images themselves. The indexes tell it from a corpus.
_INDEXES = ("image.*.jsonl", "pair.*.jsonl")
_IMAGE_TEXT_FILES = (*_INDEXES, *(f"text/{name}" for name in _SPLIT_FILES))
_LABELLED_FILES = ("label/dict.txt", "label/*.bin", "input?/*.bin")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What ``mhmoe prepare`` wrote down of a folder that it made; empty for another folder."""
    path = folder / MANIFEST
    return read_json(path) if path.is_file() else {}


@dataclass(frozen=True)
class DataIdentity:
    """A binarised corpus, labelled sentences, or images and text.

    Attributes:
        digest: SHA-256 over the hashes of the dictionary and of the splits' files, in the folder itself or in one for
            every language; the same however the folder is named, and with or without a manifest.
        source: what the corpus is, from the manifest.
        splits: bytes of text and tokens per split, of all languages together, from the manifest; empty without one.
        languages: of a corpus of several languages, else empty.
    """

    digest: str
    source: str
    splits: dict[str, dict[str, int]]
    languages: tuple[str, ...] = ()
    has_images: bool = False

    def bits_per_byte(self, split: str, bits_per_token: float, tokens: int) -> float | None:
        """None where the manifest lacks the split, or ``tokens`` are not all of its tokens."""
        counts = self.splits.get(split)
        if counts is None or counts["tokens"] != tokens:
            return None
        return bits_per_token * tokens / counts["bytes"]


def identify_data(folder: Path) -> DataIdentity:
    """Identity of a folder made by ``mhmoe prepare`` or by ``fairseq-preprocess --only-source``.

    Raises:
        UserError: if the folder holds no binarised data.
    """
    if "files" in read_manifest(folder):
        return identify_manifest(folder / MANIFEST)
    others = [path for pattern in (*_IMAGE_TEXT_FILES, *_LABELLED_FILES) for path in folder.glob(pattern)]
    files = [folder / "dict.txt", *(path for name in _SPLIT_FILES for path in _named(folder, name)), *others]
    hashes = {path.relative_to(folder).as_posix(): sha256_of(path) for path in files if path.is_file()}
    if "dict.txt" not in hashes:
        raise UserError(f"--data ({folder}) has neither manifest.json nor dict.txt: it is no binarised data")
    return _identity(hashes, str(folder), {})


def identify_manifest(path: Path) -> DataIdentity:
    """Identity from ``manifest.json`` alone.

    Raises:
        UserError: if it is not a manifest of ``mhmoe prepare``.
    """
    manifest = read_json(path)
    try:
        hashes = {name: entry["sha256"] for name, entry in manifest["files"].items()}
        if _has_images(hashes):
            return _identity(hashes, _describe(manifest["source"]), {})
        if _is_labelled(hashes):
            return _identity(hashes, str(path.parent), {})
        texts = [manifest] if "splits" in manifest else manifest["languages"].values()
        splits: dict[str, dict[str, int]] = {}
        for name, counts in (item for text in texts for item in text["splits"].items()):
            total = splits.setdefault(name, {"bytes": 0, "tokens": 0})
            splits[name] = {key: total[key] + counts[key] for key in total}
        return _identity(hashes, _describe(manifest["source"]), splits)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a manifest of mhmoe prepare: {error!r} is missing or malformed") from error


def _identity(hashes: dict[str, str], source: str, splits: dict[str, dict[str, int]]) -> DataIdentity:
    has_images = _has_images(hashes)
    languages = () if has_images or _is_labelled(hashes) else _languages(hashes)
    return DataIdentity(_digest(hashes), source, splits, languages, has_images)


def _has_images(names: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for name in names for pattern in _INDEXES)


def _is_labelled(names: Iterable[str]) -> bool:
    return _LABELLED_FILES[0] in names


def _digest(hashes: dict[str, str]) -> str:
    """Over the dictionary and the splits of the folder itself, then those of each language's folder."""
    folders = ["", *(f"{language}/" for language in _languages(hashes))]
    names = ["dict.txt", *(f"{folder}{name}" for folder in folders for name in _SPLIT_FILES)]
    others = _IMAGE_TEXT_FILES if _has_images(hashes) else _LABELLED_FILES if _is_labelled(hashes) else ()
    if others:
        names = ["dict.txt", *sorted(name for name in hashes if any(fnmatch(name, pattern) for pattern in others))]
    text = "".join(f"{name} {hashes[name]}\n" for name in names if name in hashes)
    return hashlib.sha256(text.encode()).hexdigest()


def _named(folder: Path, name: str) -> list[Path]:
    return [folder / name, *folder.glob(f"*/{name}")]


def _languages(files: Iterable[str]) -> tuple[str, ...]:
    """Folders that hold the splits; none if they are in the folder itself, whose other folders then do not count."""
    folders = {name.rpartition("/")[0] for name in files if name.endswith(_SPLIT_FILES)}
    return () if "" in folders else tuple(sorted(folders))


def _describe(source: dict[str, Any]) -> str:
    package = " ".join(str(source[key]) for key in ("package", "version") if key in source)
    return f"{source['name']} ({package})" if package else str(source["name"])
