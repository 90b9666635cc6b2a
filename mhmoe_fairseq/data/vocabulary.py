"""What binarisation needs of a tokenizer, and fairseq's dictionary made from one."""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Sequence

import numpy as np

from ..common.files import atomic_path

if TYPE_CHECKING:
    from fairseq.data import Dictionary

NUM_SPECIALS = 4  # fairseq's <s>, <pad>, </s>, <unk>: indices 0..3


class Vocabulary(Protocol):
    """A tokenizer whose symbols fill fairseq's dictionary from index 4 on, in this order."""

    @property
    def symbols(self) -> Sequence[str]: ...

    def encode_lines(self, lines: list[str]) -> list[list[int]]:
        """Dictionary indices of each line, without an end mark."""
        ...

    def describe(self) -> dict[str, object]:
        """What the manifest records."""
        ...


def build_dictionary(
    symbols: Sequence[str], counts: np.ndarray, extra_symbols: Sequence[str] = (), multiple: int = 8
) -> "Dictionary":
    """fairseq's dictionary: the four specials, ``symbols`` with their counts, ``extra_symbols``, and padding.

    Args:
        counts: (len(symbols) + 4,) occurrences by dictionary index.
        extra_symbols: symbols that no text has (count 0), such as those of languages.
        multiple: made-up symbols are added until the size is a multiple of this; 1 for none.
    """
    from fairseq.data import Dictionary

    dictionary = Dictionary()
    occurrences = [*map(int, counts[NUM_SPECIALS:]), *(0 for _ in extra_symbols)]
    for index, symbol in enumerate([*symbols, *extra_symbols], start=NUM_SPECIALS):
        if dictionary.add_symbol(symbol, n=occurrences[index - NUM_SPECIALS]) != index:
            raise RuntimeError(f"symbol {symbol!r} occurs twice in the vocabulary")
    dictionary.pad_to_multiple_(multiple)
    return dictionary


def save_dictionary(dictionary: "Dictionary", path: Path) -> None:
    """Writes ``dict.txt`` atomically, in fairseq's ``symbol count`` format."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        dictionary.save(stream)
