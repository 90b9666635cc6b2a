"""Which data a figure belongs to: perplexities of different data are never put together."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.files import read_json, sha256_of
from ..errors import UserError

_FILES = ("dict.txt", "train.bin", "valid.bin", "test.bin")


@dataclass(frozen=True)
class DataIdentity:
    """A binarised corpus.

    Attributes:
        digest: SHA-256 over the hashes of the dictionary and of the binarised splits; the same however the folder is
            named, and with or without a manifest.
        source: what the corpus is, from the manifest.
        splits: bytes of text and tokens per split, from the manifest; empty without one.
    """

    digest: str
    source: str
    splits: dict[str, dict[str, int]]

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
    if (folder / "manifest.json").is_file():
        return identify_manifest(folder / "manifest.json")
    hashes = {name: sha256_of(folder / name) for name in _FILES if (folder / name).is_file()}
    if "dict.txt" not in hashes:
        raise UserError(f"--data ({folder}) has neither manifest.json nor dict.txt: it is no binarised data")
    return DataIdentity(_digest(hashes), str(folder), {})


def identify_manifest(path: Path) -> DataIdentity:
    """Identity from ``manifest.json`` alone.

    Raises:
        UserError: if it is not a manifest of ``mhmoe prepare``.
    """
    manifest = read_json(path)
    try:
        hashes = {name: entry["sha256"] for name, entry in manifest["files"].items()}
        counted = manifest["splits"].items()
        splits = {name: {key: counts[key] for key in ("bytes", "tokens")} for name, counts in counted}
        return DataIdentity(_digest(hashes), _describe(manifest["source"]), splits)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a manifest of mhmoe prepare: {error!r} is missing or malformed") from error


def _digest(hashes: dict[str, str]) -> str:
    text = "".join(f"{name} {hashes[name]}\n" for name in _FILES if name in hashes)
    return hashlib.sha256(text.encode()).hexdigest()


def _describe(source: dict[str, Any]) -> str:
    package = " ".join(str(source[key]) for key in ("package", "version") if key in source)
    return f"{source['name']} ({package})" if package else str(source["name"])
