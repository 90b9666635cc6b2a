"""Columns of an index: millions of strings, numbers and lists in a few arrays.

A list of Python objects takes some hundred bytes for each row and is copied page by page into every worker of the data
loader, whose reading alone changes reference counts. Arrays take the bytes of the values and stay shared.
"""

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

MISSING = -1  # a number that a row does not have


class Lists:
    """Lists of numbers in one array; a list may be null, which is another thing than empty."""

    def __init__(self, values: np.ndarray, offsets: np.ndarray, nulls: np.ndarray | None = None) -> None:
        self.values, self._offsets, self._nulls = values, offsets, nulls

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> Any:
        """``(length,)``; empty for a null list."""
        return self.values[self._offsets[row] : self._offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """``(rows,)`` numbers in each list; 0 for a null one."""
        return np.diff(self._offsets)

    def is_null(self, row: int) -> bool:
        """Whether the file has null in place of a list."""
        return self._nulls is not None and bool(self._nulls[row])

    @property
    def null_rows(self) -> np.ndarray:
        """The rows that are null."""
        return np.flatnonzero(self._nulls) if self._nulls is not None else np.array([], dtype=np.int64)

    @property
    def nbytes(self) -> int:
        """Memory that is used."""
        return self.values.nbytes + self._offsets.nbytes + (0 if self._nulls is None else self._nulls.nbytes)


class Strings(Lists):
    """Strings as one block of UTF-8; a null one is empty."""

    def __getitem__(self, row: int) -> str:
        return super().__getitem__(row).tobytes().decode()


class Builder:
    """Takes the values of a column one by one.

    Args:
        typecode: of ``array``: ``i`` for lists of ids, ``f`` for lists of scores, ``B`` for strings.
    """

    def __init__(self, typecode: str) -> None:
        self._values, self._offsets, self._nulls = array(typecode), array("q", [0]), bytearray()

    def append(self, value: Sequence[float] | str | None) -> None:
        """Add a row; None becomes a null list, or the empty string."""
        self._values.extend(value.encode() if isinstance(value, str) else value or ())
        self._offsets.append(len(self._values))
        self._nulls.append(value is None)

    def finish(self) -> Lists:
        """The column."""
        nulls = np.frombuffer(bytes(self._nulls), dtype=bool)
        arrays = np.array(self._values), np.array(self._offsets)
        return Strings(*arrays) if self._values.typecode == "B" else Lists(*arrays, nulls if nulls.any() else None)


class NumbersBuilder:
    """Builds an ``(rows,)`` array of int64; None becomes ``MISSING``."""

    def __init__(self) -> None:
        self._values = array("q")

    def append(self, value: int | None) -> None:
        """Add a row."""
        self._values.append(MISSING if value is None else value)

    def finish(self) -> np.ndarray:
        """The column."""
        return np.array(self._values)
