"""Batches that hold every modality: images, texts and pairs side by side, as in BEiT-3.

Experts that are spread over ranks are called by all of them together. So every rank must make the same calls in every
step, and no batch may lack a modality. fairseq's own ``RoundRobinZipDatasets`` gives such batches too, but never
shuffles again, keeps the epoch from the data sets, so that masks would never change, and counts some samples several
times in a validation.
"""

import abc
from typing import Any

import numpy as np
from fairseq.data import FairseqDataset

from .batching import FittingRows, WholeBatches, passes


class ModalitiesDataset(WholeBatches, FittingRows, abc.ABC):
    """Several data sets zipped: item i has a sample of each, a batch a sub-batch of each under its name.

    Args:
        parts: modality -> its data, of which none may be empty. Their samples may depend on ``set_epoch``.
    """

    row_name = "one sample of every modality together"

    def __init__(self, parts: dict[str, FairseqDataset]) -> None:
        self.parts = parts
        self.lengths = {name: len(part) for name, part in parts.items()}

    def __len__(self) -> int:
        """Return the items of an epoch: as many as the largest modality has."""
        return max(self.lengths.values())

    @abc.abstractmethod
    def samples_of(self, name: str, indices: np.ndarray) -> np.ndarray:
        """Return the numbers of the samples of one modality that belong to items, -1 where none does."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        numbers = {name: int(self.samples_of(name, np.array([index]))[0]) for name in self.parts}
        return {name: self.parts[name][number] for name, number in numbers.items() if number >= 0}

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch; of a modality that these items lack it has the first sample."""
        if not samples:
            return {}
        found = {name: [sample[name] for sample in samples if name in sample] for name in self.parts}
        batches = {name: part.collater(found[name] or [part[0]]) for name, part in self.parts.items()}
        return {"nsentences": len(samples), **batches}

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        """Return the positions of all modalities together, of several items."""
        counts = np.zeros(len(indices), dtype=np.int64)
        for name, part in self.parts.items():
            numbers = self.samples_of(name, indices)
            counts[numbers >= 0] += part.num_tokens_vec(numbers[numbers >= 0])
        return counts


class TrainingModalities(ModalitiesDataset):
    """The training set: each modality goes through its samples again and again, at its own pace.

    An epoch is as many items as the largest modality has samples. A smaller one meanwhile is visited several times,
    and goes on in the next epoch where it stopped, so that all of its samples come equally often. Every visit has its
    own order and, since the visit's number is the data set's epoch, its own masks and crops. All of it follows from
    the seed and the epoch alone.

    Args:
        seed: of the orders.
    """

    can_reuse_epoch_itr_across_epochs = False

    def __init__(self, parts: dict[str, FairseqDataset], seed: int) -> None:
        super().__init__(parts)
        self.seed, self.epoch = seed, 0
        self.set_epoch(1)

    def set_epoch(self, epoch: int) -> None:
        """Draw the epoch's orders, for the workers too, which are forked later: fairseq's hook before an epoch."""
        if epoch != self.epoch:
            self.epoch = epoch
            self._orders = {  # of small numbers, since there may be millions
                name: passes(length, len(self), epoch - 1, self.seed, name).astype(np.min_scalar_type(length))
                for name, length in self.lengths.items()
            }

    def samples_of(self, name: str, indices: np.ndarray) -> np.ndarray:
        """Return the numbers of the samples of one modality, of which every item has one."""
        return self._orders[name][indices]

    def __getitem__(self, index: int) -> dict[str, Any]:
        for name, part in self.parts.items():
            part.set_epoch(((self.epoch - 1) * len(self) + int(index)) // self.lengths[name] + 1)
        return super().__getitem__(index)


class EvaluationModalities(ModalitiesDataset):
    """A held-out set: every sample of every modality once, with the same masks each time.

    The samples of smaller modalities are spread evenly. A batch that gets none of a modality has one all the same,
    marked ``counted: False``: the experts' calls stay the same on all ranks.
    """

    def samples_of(self, name: str, indices: np.ndarray) -> np.ndarray:
        """Return the numbers of the samples of one modality that belong to items, -1 where none does."""
        count, length = self.lengths[name], len(self)
        numbers = -(-indices * count // length)
        belongs = (numbers < count) & (numbers * length // count == indices)
        return np.where(belongs, numbers, -1)

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch with about as many samples of each modality as its share of all, marked where it has any."""
        batch = super().collater(samples)
        for name in self.parts if samples else ():
            batch[name]["counted"] = any(name in sample for sample in samples)
        return batch
