"""Batches that hold every modality: images, texts and pairs side by side, as in BEiT-3.

Experts that are spread over ranks are called by all of them together. So every rank must make the same calls in every
step, and no batch may lack a modality. fairseq's own ``RoundRobinZipDatasets`` gives such batches too, but never
shuffles again, keeps the epoch from the data sets, so that masks would never change, and counts some samples several
times in a validation.
"""

import zlib
from typing import Any

import numpy as np
from fairseq.data import FairseqDataset

from ...common.errors import UserError
from .batching import SizedRows, WholeBatches


class ModalitiesDataset(WholeBatches, SizedRows):
    """Several data sets zipped: item i has a sample of each, a batch a sub-batch of each under its name.

    Args:
        parts: modality -> its data, of which none may be empty. Their samples may depend on ``set_epoch``.
    """

    def __init__(self, parts: dict[str, FairseqDataset]) -> None:
        self.parts = parts
        self.lengths = {name: len(part) for name, part in parts.items()}

    def __len__(self) -> int:
        """Items of an epoch: as many as the largest modality has."""
        return max(self.lengths.values())

    def filter_indices_by_size(self, indices: np.ndarray, max_sizes: Any) -> tuple[np.ndarray, list[int]]:
        """All of them: texts have been cut to ``--max-text-length``."""
        return indices, []

    def batch_by_size(self, indices: np.ndarray, max_tokens: int | None = None, **kwargs: Any) -> list[np.ndarray]:
        """Batches of ``indices``, in order.

        Raises:
            UserError: if ``--max-tokens`` is less than the positions of one item.
        """
        if max_tokens is not None:
            longest = int(self.num_tokens_vec(indices).max())
            if longest > max_tokens:
                raise UserError(
                    f"--max-tokens ({max_tokens}) must be at least {longest}, the positions of one sample of every "
                    "modality together"
                )
        return super().batch_by_size(indices, max_tokens=max_tokens, **kwargs)


class TrainingModalities(ModalitiesDataset):
    """The training set: each modality goes through its samples again and again, at its own pace.

    An epoch is as many items as the largest modality has samples. A smaller one meanwhile is visited several times,
    and goes on in the next epoch where it stopped, so that all of its samples come equally often. Every visit has its
    own order and, since the visit's number is the data set's epoch, its own masks and crops. All of it follows from
    the seed and the epoch alone.

    Args:
        parts: as in :class:`ModalitiesDataset`.
        seed: of the orders.
    """

    can_reuse_epoch_itr_across_epochs = False

    def __init__(self, parts: dict[str, FairseqDataset], seed: int) -> None:
        super().__init__(parts)
        self.seed = seed
        self.epoch = 1
        self._orders: dict[str, np.ndarray] = {}

    def set_epoch(self, epoch: int) -> None:
        """fairseq's hook before an epoch."""
        if epoch != self.epoch:
            self.epoch = epoch
            self._orders = {}

    def ordered_indices(self) -> np.ndarray:
        """The epoch's items; ready for the workers, which are forked later."""
        self._prepare_orders()
        return np.arange(len(self))

    def visit_and_row(self, name: str, index: int) -> tuple[int, int]:
        """The visit, from 1, and the number of the sample of one modality that belongs to an item."""
        self._prepare_orders()
        visit = ((self.epoch - 1) * len(self) + index) // self.lengths[name]
        return visit + 1, int(self._orders[name][index])

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {}
        for name, part in self.parts.items():
            visit, number = self.visit_and_row(name, int(index))
            part.set_epoch(visit)
            item[name] = part[number]
        return item

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """One batch, as many samples of every modality."""
        if not samples:
            return {}
        batches = {name: part.collater([sample[name] for sample in samples]) for name, part in self.parts.items()}
        return {"nsentences": len(samples), **batches}

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        """Positions of all modalities together, of several items."""
        self._prepare_orders()
        return sum(part.num_tokens_vec(self._orders[name][indices]) for name, part in self.parts.items())

    def _prepare_orders(self) -> None:
        if not self._orders:
            self._orders = {name: self._order(name) for name in self.parts}

    def _order(self, name: str) -> np.ndarray:
        """``(items,)`` numbers of samples of one modality in this epoch."""
        length = self.lengths[name]
        first = (self.epoch - 1) * len(self)
        visits = range(first // length, -(-(first + len(self)) // length))
        seed = [self.seed % 2**32, zlib.crc32(name.encode())]
        kind = np.min_scalar_type(length)  # small, since there may be millions
        orders = [np.random.default_rng([*seed, visit]).permutation(length).astype(kind) for visit in visits]
        start = first - visits[0] * length
        return np.concatenate(orders)[start : start + len(self)]


class EvaluationModalities(ModalitiesDataset):
    """A held-out set: every sample of every modality once, with the same masks each time.

    The samples of smaller modalities are spread evenly. A batch that gets none of a modality has one all the same,
    marked ``counted: False``: the experts' calls stay the same on all ranks.
    """

    def samples_of(self, name: str, indices: np.ndarray) -> np.ndarray:
        """The numbers of the samples of one modality that belong to items, -1 where none does."""
        count, length = self.lengths[name], len(self)
        numbers = -(-indices * count // length)
        belongs = (numbers < count) & (numbers * length // count == indices)
        return np.where(belongs, numbers, -1)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = {}
        for name, part in self.parts.items():
            number = int(self.samples_of(name, np.array([index]))[0])
            if number >= 0:
                item[name] = part[number]
        return item

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """One batch, with about as many samples of each modality as its share of all."""
        if not samples:
            return {}
        batch: dict[str, Any] = {"nsentences": len(samples)}
        for name, part in self.parts.items():
            found = [sample[name] for sample in samples if name in sample]
            batch[name] = {**part.collater(found or [part[0]]), "counted": bool(found)}
        return batch

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        """Positions of all modalities together, of several items."""
        counts = np.zeros(len(indices), dtype=np.int64)
        for name, part in self.parts.items():
            numbers = self.samples_of(name, indices)
            counts[numbers >= 0] += part.num_tokens_vec(numbers[numbers >= 0])
        return counts
