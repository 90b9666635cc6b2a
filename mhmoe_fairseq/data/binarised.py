"""Checks of binarised data before it is read: fairseq itself maps a truncated file without a word."""

import struct
from pathlib import Path

import numpy as np
from fairseq.data.indexed_dataset import IndexedRawTextDataset, MMapIndexedDataset, _code_to_dtype

from ..common.errors import UserError

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
    with open(index, "rb") as file:
        header = file.read(_HEADER.size)
    if header[: len(_MAGIC)] != _MAGIC[: len(header)]:
        return
    if len(header) < _HEADER.size:
        raise UserError(f"{index} has {len(header)} bytes and no complete header: truncated")
    _, _, code, lines = _HEADER.unpack(header)
    _check_size(index, _HEADER.size + lines * _BYTES_PER_LINE, "its header says", "truncated")
    dtype = np.dtype(_code_to_dtype[code])
    sizes = np.fromfile(index, dtype=np.int32, count=lines, offset=_HEADER.size)
    expected = int(sizes.sum(dtype=np.int64)) * dtype.itemsize
    _check_size(data, expected, f"{index.name} says", "truncated, or of another run")
    if not expected:
        raise UserError(f"{data} is empty: there is no text in this split")
    largest = int(np.memmap(data, dtype=dtype, mode="r")[:_CHECKED_TOKENS].max())
    if largest >= vocabulary_size:
        raise UserError(
            f"{data} has token id {largest}, dict.txt has {vocabulary_size:,} words: binarised with another dictionary"
        )


def _check_size(file: Path, expected: int, source: str, fault: str) -> None:
    actual = file.stat().st_size
    if actual != expected:
        raise UserError(f"{file} has {actual:,} bytes, {source} {expected:,}: {fault}")
