"""One step of masked data modelling: as many pictures, texts and pairs, on every rank."""

from __future__ import annotations

from typing import Any, Mapping

import numpy as np
from fairseq.data import FairseqDataset

from ..collate import Sample
from .masked import MaskedDataset


class ZippedModalities(FairseqDataset):
    """Several data sets side by side: a batch is ``{modality: batch of it}``, each of as many samples.

    As fairseq's ``RoundRobinZipDatasets``, and more: epochs reach the data sets. In training a shorter one starts
    again, in another order and with other crops and masks, as often as the longest needs. In evaluation every sample
    counts once: where a shorter one has ended, fillers follow, which have nothing to predict, so that every step still
    makes the same calls.

    Args:
        datasets: modality -> data set, all for training or all for evaluation.
    """

    def __init__(self, datasets: Mapping[str, MaskedDataset]) -> None:
        self.datasets = dict(datasets)
        self._training = any(dataset.settings.training for dataset in self.datasets.values())
        self._length = max(map(len, self.datasets.values()))
        self._arrange()

    def _arrange(self) -> None:
        """Line the data sets' rows up; as small integers, since the longest one's length is what all have."""
        self._rows = {key: self._rows_of(dataset) for key, dataset in self.datasets.items()}
        self.sizes = sum(dataset.sizes[self._rows[key]] for key, dataset in self.datasets.items())

    def _rows_of(self, dataset: MaskedDataset) -> np.ndarray:
        visits = -(-self._length // len(dataset))
        kind = np.min_scalar_type(len(dataset))
        return np.concatenate([dataset.order(visit).astype(kind) for visit in range(visits)])[: self._length]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Sample]:
        return {key: self._draw(key, int(index)) for key in self.datasets}

    def _draw(self, key: str, index: int) -> Sample:
        dataset, row = self.datasets[key], int(self._rows[key][index])
        visit = index // len(dataset)
        if visit and not self._training:
            return dataset.filler(row)
        return dataset.draw(row, visit)

    def collater(self, samples: list[dict[str, Sample]]) -> dict[str, Any]:
        """``{modality: batch}``; ``{}`` of no samples."""
        if not samples:
            return {}
        return {key: dataset.collater([sample[key] for sample in samples]) for key, dataset in self.datasets.items()}

    def ordered_indices(self) -> np.ndarray:
        """Steps in order: it is the data sets that are shuffled."""
        return np.arange(len(self))

    def set_epoch(self, epoch: int) -> None:
        """fairseq's hook before an epoch."""
        before = {dataset.epoch for dataset in self.datasets.values()}
        for dataset in self.datasets.values():
            dataset.set_epoch(epoch)
        if before != {dataset.epoch for dataset in self.datasets.values()}:
            self._arrange()

    @property
    def can_reuse_epoch_itr_across_epochs(self) -> bool:
        """False in training: every epoch has its own batches."""
        return not self._training

    def num_tokens(self, index: int) -> int:
        """Positions in the model of all modalities together."""
        return int(self.sizes[index])

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        """Positions at each of several places."""
        return self.sizes[indices]

    def size(self, index: int) -> int:
        """As ``num_tokens``."""
        return self.num_tokens(index)

    def filter_indices_by_size(self, indices: np.ndarray, max_sizes: Any) -> tuple[np.ndarray, list[int]]:
        """Every sample fits: texts are cut."""
        return indices, []

    def batch_by_size(
        self, indices: np.ndarray, *args: Any, required_batch_size_multiple: int = 1, **kwargs: Any
    ) -> list[np.ndarray]:
        """Batches that hold every sample: fairseq-fixed drops a last one of another multiple."""
        return super().batch_by_size(indices, *args, required_batch_size_multiple=1, **kwargs)
