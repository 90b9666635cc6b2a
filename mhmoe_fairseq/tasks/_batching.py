"""Batches that hold every sample, on both fairseq versions."""

from __future__ import annotations

import copy

import numpy as np
from fairseq.data import FairseqDataset, MonolingualDataset


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
    def of(cls, dataset: MonolingualDataset) -> WholeMonolingualDataset:
        """The same dataset with this class's batches."""
        whole = copy.copy(dataset)
        whole.__class__ = cls
        return whole
