"""Whole words in a language model's blocks: which tokens a word consists of."""

import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from fairseq.data import Dictionary

from ...data.vocabularies import open_vocabulary

# What stands for a text that is not known; it is part of a word, so that no word beside it is taken for whole.
UNKNOWN = b"_"
# A part of a contraction, of a hyphenated word, of a path or a name in a program is no whole word; halves of characters
# that were cut belong to words.
_LETTERS = r"[\w\udc80-\udcff]+"
_WORD = re.compile(rf"{_LETTERS}(?:[-'’./@]{_LETTERS})*")


class Occurrence(NamedTuple):
    """A word, and the positions ``start`` to ``stop - 1`` of its tokens in a row."""

    word: str
    start: int
    stop: int


def symbol_texts(dictionary: Dictionary, folder: Path) -> list[bytes]:
    """Return what every dictionary index stands for in a text, in UTF-8: a line's end for the end mark.

    Args:
        folder: the prepared data.

    Raises:
        UserError: the dictionary is not the tokenizer's, or the tokenizer cannot be read.
    """
    specials = [b"\n" if index == dictionary.eos() else UNKNOWN for index in range(dictionary.nspecial)]
    symbols = dictionary.symbols[dictionary.nspecial :]
    vocabulary = open_vocabulary(folder, symbols)
    if vocabulary is None:
        return [*specials, *(f" {symbol}".encode() for symbol in symbols)]
    return [*specials, *vocabulary.texts, *[UNKNOWN] * (len(symbols) - len(vocabulary.symbols))]


def find_words(texts: Sequence[bytes], words: Collection[str]) -> Iterator[Occurrence]:
    """Yield the occurrences of whole words, spelled exactly so, that lie in a block from their first character on.

    Args:
        texts: of a block's tokens, and of the token after them, which only shows whether the last word goes on.
    """
    data = b"".join([UNKNOWN, *texts, UNKNOWN])
    text = data.decode("utf-8", "surrogateescape")
    offsets = np.cumsum([0, *(len(character.encode("utf-8", "surrogateescape")) for character in text)])
    ends = np.cumsum([len(UNKNOWN), *map(len, texts)])[1:]
    for found in _WORD.finditer(text):
        if found[0] in words:
            first, last = np.searchsorted(ends, [offsets[found.start()], offsets[found.end() - 1]], side="right")
            is_alone = b"".join(texts[first : last + 1]).strip() == found[0].encode()
            if is_alone and last < len(texts) - 1:
                yield Occurrence(found[0], int(first), int(last) + 1)
