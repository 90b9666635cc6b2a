"""Binarised data before it is read: which splits there are; checks, since fairseq maps a truncated file unsaid."""

import struct
from pathlib import Path

import numpy as np
from fairseq.data.indexed_dataset import IndexedRawTextDataset, MMapIndexedDataset, _code_to_dtype

from ..common.errors import UserError
from .identity import read_manifest

_MAGIC = MMapIndexedDataset.Index._HDR_MAGIC
_HEADER = struct.Struct(f"<{len(_MAGIC)}sQBQ")  # magic, version, dtype code, number of lines
_BYTES_PER_LINE = 4 + 8  # its length and its address
_CHECKED_TOKENS = 2**20


def check_folder(folder: Path) -> None:
    """Check that the folder of a shard has a dictionary: a ``FileNotFoundError`` names what is missing."""
    if not folder.is_dir():
        raise FileNotFoundError(f"data folder {folder} does not exist")
    if not (folder / "dict.txt").is_file():
        raise FileNotFoundError(f"{folder / 'dict.txt'} is missing: {folder} holds no binarised data")


def check_split(prefix: Path, vocabulary_size: int) -> None:
    """Check that ``prefix.idx`` and ``prefix.bin`` are there, complete, and use the dictionary's ids.

    Formats other than fairseq's default memory map are left to fairseq. Ids are looked at in the first million tokens.

    Raises:
        FileNotFoundError: if a file is missing.
        UserError: if one is truncated, empty, or of another dictionary.
    """
    index, data = prefix.with_name(prefix.name + ".idx"), prefix.with_name(prefix.name + ".bin")
    if IndexedRawTextDataset.exists(str(prefix)):
        return
    for file in (index, data):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: binarise the data, see mhmoe prepare")
    if (described := _read_index(index)) is None:
        return
    sizes, dtype = described
    expected = int(sizes.sum(dtype=np.int64)) * dtype.itemsize
    _check_size(data, expected, f"{index.name} says", "truncated, or of another run")
    if not expected:
        raise UserError(f"{data} is empty: there is no text in this split")
    largest = int(np.memmap(data, dtype=dtype, mode="r")[:_CHECKED_TOKENS].max())
    if largest >= vocabulary_size:
        raise UserError(
            f"{data} has token id {largest}, dict.txt has {vocabulary_size:,} words: binarised with another dictionary"
        )


def line_sizes(prefix: Path) -> np.ndarray:
    """Return the tokens of each line of a split, its end mark included; a ``UserError`` if there is no such split."""
    index = prefix.with_name(prefix.name + ".idx")
    if (described := _read_index(index)) is None:
        raise UserError(f"{index} is missing, or not binarised as mhmoe prepare does it")
    return described[0]


def _read_index(index: Path) -> tuple[np.ndarray, np.dtype] | None:
    """Return each line's tokens, and their type; None without the file, or in another format than fairseq's own.

    Raises:
        UserError: if it is truncated.
    """
    if not index.is_file():
        return None
    with open(index, "rb") as file:
        header = file.read(_HEADER.size)
    if header[: len(_MAGIC)] != _MAGIC[: len(header)]:
        return None
    if len(header) < _HEADER.size:
        raise UserError(f"{index} has {len(header)} bytes and no complete header: truncated")
    _, _, code, lines = _HEADER.unpack(header)
    _check_size(index, _HEADER.size + lines * _BYTES_PER_LINE, "its header says", "truncated")
    sizes = np.fromfile(index, dtype=np.int32, count=lines, offset=_HEADER.size)
    return sizes, np.dtype(_code_to_dtype[code])


def domain_splits(folder: Path, split: str) -> dict[str, str]:
    """Return the domains that a split is made of, each with the name of its own split: ``{"brown": "test_brown"}``.

    A manifest of ``mhmoe prepare`` names them. Without one they are the splits ``SPLIT_*`` whose tokens add up to the
    whole's, but for the end marks of empty lines between them: an unrelated ``valid_other`` is no domain of ``valid``.
    """
    listed = read_manifest(folder).get("splits")
    names = [path.stem for path in folder.glob("*.idx")] if listed is None else listed
    found = {name.removeprefix(f"{split}_"): name for name in sorted(names) if name.startswith(f"{split}_")}
    if not found or listed is not None:
        return found
    indexes = [_read_index(folder / f"{name}.idx") for name in (split, *found.values())]
    if None in indexes:
        return {}
    whole, *parts = [int(sizes.sum(dtype=np.int64)) for sizes, _ in filter(None, indexes)]
    return found if 0 <= whole - sum(parts) < len(parts) else {}


def _check_size(file: Path, expected: int, source: str, fault: str) -> None:
    actual = file.stat().st_size
    if actual != expected:
        raise UserError(f"{file} has {actual:,} bytes, {source} {expected:,}: {fault}")
