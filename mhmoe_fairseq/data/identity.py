"""Which data a metric belongs to: perplexities of different data are never put together."""

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
    """Return what ``mhmoe prepare`` wrote down of a folder that it made; empty for another folder."""
    path = folder / MANIFEST
    return read_json(path) if path.is_file() else {}


@dataclass(frozen=True)
class DataIdentity:
    """A binarised corpus, labelled sentences, or images and text.

    Attributes:
        digest: SHA-256 over the hashes of the dictionary and of the splits' files, in the folder itself or in one for
            every language; the same however the folder is named, and with or without a manifest.
        source: what the corpus is, from the manifest.
        splits: bytes of text and tokens per split, such as ``test``, a domain's ``test_brown`` or a language's
            ``test_de``, from the manifest; empty without one.
        languages: of a corpus of several languages, else empty.
    """

    digest: str
    source: str
    splits: dict[str, dict[str, int]]
    languages: tuple[str, ...] = ()
    has_images: bool = False

    def bytes_of(self, split: str, tokens: int) -> int | None:
        """Return a split's bytes of text; None where the manifest lacks it or ``tokens`` are not all of its tokens."""
        counts = self.splits.get(split)
        return counts["bytes"] if counts is not None and counts["tokens"] == tokens else None


def identify_data(folder: Path) -> DataIdentity:
    """Return the identity of a folder made by ``mhmoe prepare`` or by ``fairseq-preprocess --only-source``.

    Raises:
        UserError: if the folder holds no binarised data.
    """
    if "files" in read_manifest(folder):
        return identify_manifest(folder / MANIFEST)
    corpus = (f"{parent}{name}" for name in _SPLIT_FILES for parent in ("", "*/"))
    patterns = ("dict.txt", *corpus, *_IMAGE_TEXT_FILES, *_LABELLED_FILES)
    files = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    hashes = {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}
    if "dict.txt" not in hashes:
        raise UserError(f"--data ({folder}) has neither manifest.json nor dict.txt: it is no binarised data")
    return _identity(hashes, str(folder), {})


def identify_manifest(path: Path) -> DataIdentity:
    """Return the identity that ``manifest.json`` alone tells.

    Raises:
        UserError: if it is not a manifest of ``mhmoe prepare``.
    """
    manifest = read_json(path)
    try:
        hashes = {name: entry["sha256"] for name, entry in manifest["files"].items()}
        kind = _patterns(hashes)
        source = str(path.parent) if kind == _LABELLED_FILES else _describe(manifest["source"])
        texts = {} if kind else {"": manifest} if "splits" in manifest else manifest["languages"]
        splits = {
            f"{split}_{code}" if code else split: {key: counts[key] for key in ("bytes", "tokens")}
            for code, text in texts.items()
            for split, counts in text["splits"].items()
        }
        return _identity(hashes, source, splits)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a manifest of mhmoe prepare: {error!r} is missing or malformed") from error


def _patterns(names: Iterable[str]) -> tuple[str, ...]:
    """Names of the files that tell such data apart; none for a corpus, whose splits lie here or in every language's."""
    if any(fnmatch(name, pattern) for name in names for pattern in _INDEXES):
        return _IMAGE_TEXT_FILES
    return _LABELLED_FILES if _LABELLED_FILES[0] in names else ()


def _identity(hashes: dict[str, str], source: str, splits: dict[str, dict[str, int]]) -> DataIdentity:
    patterns = _patterns(hashes)
    languages: tuple[str, ...] = ()
    names = sorted(name for name in hashes if any(fnmatch(name, pattern) for pattern in patterns))
    if not patterns:
        # Folders that hold the splits; none if they lie here: then other folders do not count.
        folders = {name.rpartition("/")[0] for name in hashes if name.endswith(_SPLIT_FILES)}
        languages = () if "" in folders else tuple(sorted(folders))
        names = [f"{folder}{name}" for folder in ("", *(f"{code}/" for code in languages)) for name in _SPLIT_FILES]
    text = "".join(f"{name} {hashes[name]}\n" for name in ("dict.txt", *names) if name in hashes)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return DataIdentity(digest, source, splits, languages, patterns == _IMAGE_TEXT_FILES)


def _describe(source: dict[str, Any]) -> str:
    package = " ".join(str(source[key]) for key in ("package", "version") if key in source)
    return f"{source['name']} ({package})" if package else str(source["name"])
