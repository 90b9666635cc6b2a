"""Text files to fairseq's memory-mapped data sets.

A line becomes its tokens and ``</s>``. An empty line, which stands between two documents, becomes a lone ``</s>``:
this is what ``fairseq-preprocess`` makes of it and what ``--sample-break-mode complete_doc`` takes for a document
boundary. Every byte of the text file, line ends included, is thus covered by the tokens of the data set.
"""

import contextlib
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Callable, Iterator, Sequence

import numpy as np
from tqdm import tqdm

from ..common.files import atomic_path
from ..data.vocabularies import NUM_SPECIALS, Vocabulary

_EOS, _UNK = 2, 3
_BATCH_LINES = 2000


@dataclass
class SplitCounts:
    """Sizes of one part. ``tokens`` counts every ``</s>`` too; ``bytes`` is the size of the text file."""

    bytes: int = 0
    characters: int = 0
    words: int = 0
    lines: int = 0
    documents: int = 1
    tokens: int = 0
    unknown_tokens: int = 0

    def add(self, line: str) -> None:
        """Counts a line of the text, which ends a document where it is empty."""
        self.characters += len(line) + 1
        self.words += len(line.split())
        self.lines += line != ""
        self.documents += line == ""

    def as_dict(self) -> dict[str, float]:
        """Returns the counts and the bytes per token."""
        return {**asdict(self), "bytes_per_token": round(self.bytes / self.tokens, 4) if self.tokens else 0.0}


@contextlib.contextmanager
def dataset_writer(prefix: Path, vocab_size: int) -> Iterator[Callable[[Sequence[int] | np.ndarray], None]]:
    """Gives a function that adds a line of ids to ``prefix.bin`` and ``prefix.idx``, which appear at the end."""
    import torch
    from fairseq.data import indexed_dataset

    with atomic_path(prefix.with_suffix(".idx")) as index, atomic_path(prefix.with_suffix(".bin")) as data:
        builder = indexed_dataset.make_builder(str(data), impl="mmap", vocab_size=vocab_size)
        yield lambda ids: builder.add_item(torch.from_numpy(np.asarray(ids, dtype=np.int64)))
        builder.finalize(str(index))


def binarize(text: Path, prefix: Path, vocabulary: Vocabulary) -> tuple[SplitCounts, np.ndarray]:
    """Writes ``prefix.bin`` and ``prefix.idx``, each atomically.

    Returns:
        the counts, and the occurrences of every dictionary index: (len(symbols) + 4,) int64.
    """
    vocab_size, lines = len(vocabulary.symbols) + NUM_SPECIALS, _lines(text)
    occurrences = np.zeros(vocab_size, dtype=np.int64)
    counts = SplitCounts(bytes=text.stat().st_size)
    bar = tqdm(desc=f"binarise {prefix.name}", total=counts.bytes, unit="B", unit_scale=True, disable=None)
    with dataset_writer(prefix, vocab_size) as add, bar:
        while batch := list(islice(lines, _BATCH_LINES)):
            items = [np.array([*ids, _EOS], dtype=np.int64) for ids in vocabulary.encode_lines(batch)]
            for line, item in zip(batch, items):
                add(item)
                counts.add(line)
                bar.update(len(line.encode()) + 1)
            occurrences += np.bincount(np.concatenate(items), minlength=vocab_size)
    counts.tokens = int(occurrences.sum())
    counts.unknown_tokens = int(occurrences[_UNK])
    return counts, occurrences


def count_text(text: Path) -> SplitCounts:
    """Counts the sizes of a text file, without tokens."""
    counts = SplitCounts(bytes=text.stat().st_size)
    for line in _lines(text):
        counts.add(line)
    return counts


def iter_lines(text: Path) -> Iterator[str]:
    """Returns the lines of a text file that are not empty."""
    return filter(None, _lines(text))


def _lines(text: Path) -> Iterator[str]:
    with open(text, encoding="utf-8", newline="\n") as stream:
        for line in stream:
            yield line.rstrip("\n")
