"""What data sets share: rows of known sizes, batches that hold every row on both fairseq versions, passes over rows."""

import copy
import zlib
from typing import Any

import numpy as np
from fairseq.data import FairseqDataset, MonolingualDataset

from ...common.errors import UserError


class SizedRows(FairseqDataset):
    """A data set whose rows' lengths, or positions in the model, are ``sizes (rows,)``."""

    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.sizes)

    def num_tokens(self, index: int) -> int:
        """Return the size of a row."""
        return int(self.num_tokens_vec(np.array([index]))[0])

    size = num_tokens

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        """Return the sizes of several rows."""
        return self.sizes[indices]


class FittingRows(SizedRows):
    """Rows that all fit into the model, since their texts are cut; ``row_name`` says in messages what a row is."""

    row_name = "one sample"

    def filter_indices_by_size(self, indices: np.ndarray, max_sizes: Any) -> tuple[np.ndarray, list[int]]:
        """Leave no row out."""
        return indices, []

    def batch_by_size(self, indices: np.ndarray, max_tokens: int | None = None, **kwargs: Any) -> list[np.ndarray]:
        """Return batches of ``indices``, in order; a ``UserError`` if ``--max-tokens`` has no room for one row."""
        _check_max_tokens(max_tokens, self.num_tokens_vec(indices), f"positions of {self.row_name}")
        return super().batch_by_size(indices, max_tokens=max_tokens, **kwargs)


class WholeBatches(FairseqDataset):
    """Stands in front of a dataset's class among the bases: its batches hold every sample.

    fairseq-fixed 0.12.3.1 drops the last batch if its size is no multiple of ``--required-batch-size-multiple``, 8 by
    default: training and validation silently lose data. fairseq 0.12.2 keeps it as a smaller batch, and so does this.
    """

    def batch_by_size(self, indices: np.ndarray, *args: object, **kwargs: object) -> list[np.ndarray]:
        """Return batches of ``indices``, in order; what the installed fairseq leaves out becomes the last batch."""
        batches = list(super().batch_by_size(indices, *args, **kwargs))
        batched = sum(len(batch) for batch in batches)
        return batches if batched == len(indices) else [*batches, np.asarray(indices[batched:])]


class WholeMonolingualDataset(WholeBatches, MonolingualDataset):
    """fairseq's dataset of one text, in whole batches."""

    @classmethod
    def of(cls, dataset: MonolingualDataset) -> "WholeMonolingualDataset":
        """Return the same dataset with this class's batches."""
        whole = copy.copy(dataset)
        whole.__class__ = cls
        return whole


def require_fitting_blocks(
    sizes: np.ndarray, positions: int | None, max_tokens: int | None = None, context_window: int = 0
) -> None:
    """Stop where fairseq would leave out the blocks that a model cannot read, and tell a figure of the others.

    Args:
        sizes: tokens of each block.
        positions: most tokens that the model reads; None for any number.
        context_window: tokens before a block that are read with it.

    Raises:
        UserError: naming the flag, the lengths and what to do.
    """
    lengths = sizes + context_window
    longest = int(lengths.max(initial=0))
    if positions is not None and longest > positions:
        context = f", {context_window:,} of them --context-window" if context_window else ""
        raise UserError(
            f"--tokens-per-sample: {int((lengths > positions).sum()):,} of {len(lengths):,} blocks are longer than the "
            f"model's {positions:,} positions (the longest: {longest:,} tokens{context}) and would be left out: give "
            f"--tokens-per-sample {positions}, and --sample-break-mode none where a line or document is longer"
        )
    _check_max_tokens(max_tokens, lengths, "tokens of the longest block")


def _check_max_tokens(max_tokens: int | None, sizes: np.ndarray, what: str) -> None:
    longest = int(sizes.max(initial=0))
    if max_tokens is not None and longest > max_tokens:
        raise UserError(f"--max-tokens ({max_tokens}) must be at least {longest:,}, the {what}")


def passes(size: int, count: int, visit: int, seed: int, name: str) -> np.ndarray:
    """Return the rows, ``(count,)`` numbers below ``size``, that an epoch takes of what is called ``name``.

    There is an endless sequence of passes over the rows, each in an order of its own; epochs take the next ``count``
    of it. So at any time all rows have been seen equally often, give or take one, and what an epoch holds follows
    from the arguments alone.

    Args:
        visit: epochs before this one, of the same rows.
    """
    start, end = visit * count, (visit + 1) * count
    orders = [_one_pass(size, number, seed, name) for number in range(start // size, -(-end // size))]
    first = start // size * size
    return np.concatenate([np.empty(0, dtype=np.int64), *orders])[start - first : end - first]


def _one_pass(size: int, number: int, seed: int, name: str) -> np.ndarray:
    # crc32 and not hash(), which differs from process to process.
    return np.random.default_rng([seed % 2**32, zlib.crc32(name.encode()), number]).permutation(size)
