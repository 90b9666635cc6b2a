"""What data sets share: rows of known sizes, and batches that hold every row on both fairseq versions."""

import copy

import numpy as np
from fairseq.data import FairseqDataset, MonolingualDataset

from ...common.errors import UserError


class SizedRows(FairseqDataset):
    """A data set whose rows' lengths, or positions in the model, are ``sizes (rows,)``."""

    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.sizes)

    def num_tokens(self, index: int) -> int:
        """The size of a row."""
        return int(self.num_tokens_vec(np.array([index]))[0])

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        """The sizes of several rows."""
        return self.sizes[indices]

    def size(self, index: int) -> int:
        """As ``num_tokens``."""
        return self.num_tokens(index)


class WholeBatches(FairseqDataset):
    """Stands in front of a dataset's class among the bases: its batches hold every sample.

    fairseq-fixed 0.12.3.1 drops the last batch if its size is no multiple of ``--required-batch-size-multiple``, 8 by
    default: training and validation silently lose data. fairseq 0.12.2 keeps it as a smaller batch, and so does this.
    """

    def batch_by_size(self, indices: np.ndarray, *args: object, **kwargs: object) -> list[np.ndarray]:
        """Batches of ``indices``, in order; what the installed fairseq leaves out becomes the last batch."""
        batches = list(super().batch_by_size(indices, *args, **kwargs))
        batched = sum(len(batch) for batch in batches)
        return batches if batched == len(indices) else [*batches, np.asarray(indices[batched:])]


class WholeMonolingualDataset(WholeBatches, MonolingualDataset):
    """fairseq's dataset of one text, in whole batches."""

    @classmethod
    def of(cls, dataset: MonolingualDataset) -> "WholeMonolingualDataset":
        """The same dataset with this class's batches."""
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
        max_tokens: most tokens of a batch.
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
    if max_tokens is not None and longest > max_tokens:
        raise UserError(f"--max-tokens ({max_tokens}) must be at least {longest:,}, the tokens of the longest block")
