"""The batches of a rank: fillers where it has run out of them, and the position where a resumed training continues.

fairseq deals an epoch's batches out to the ranks one after another. Where their number leaves a remainder some ranks
get one batch less, and since the others wait for them in every exchange they compute a copy of an earlier one. fairseq
itself asks only the last batch of an update whether it is such a filler, and then drops all of the rank's batches of
that update from the number of samples by which the gradient is divided, and from what is logged. Nor does it tell
anybody in a validation. Here a filler is a batch like others that says that it does not count, and counts nowhere.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fairseq.data import FairseqDataset
from fairseq.data.iterators import EpochBatchIterator
from torch import Tensor

logger = logging.getLogger(__name__)

_COUNTED = "counted"  # criterions read it too, of a batch and of its parts


@dataclass(frozen=True)
class FillingCollater:
    """A data set's own collate function; of no samples it makes a filler of some of the data set's, and not nothing."""

    dataset: FairseqDataset
    collate: Callable[[list], Any]
    filling: Sequence[int]

    def __call__(self, samples: list[Any]) -> Any:
        """Return one batch."""
        if samples:
            return self.collate(samples)
        return {**self.collate([self.dataset[number] for number in self.filling]), _COUNTED: False}


def is_filler(sample: dict[str, Any]) -> bool:
    """Return whether a batch is there only for the calls that all ranks make together."""
    return not sample.get(_COUNTED, True)


def without_metrics(outcome: tuple[Tensor, Any, dict[str, Any]]) -> tuple[Tensor, Any, dict[str, Any]]:
    """Return a filler's loss, sample size and log: the same keys as other ranks have, all zero."""
    loss, sample_size, log = outcome
    zeros = {key: torch.zeros_like(value) if torch.is_tensor(value) else 0 for key, value in log.items()}
    return torch.zeros_like(loss), sample_size * 0, zeros


class ResumableEpochBatchIterator(EpochBatchIterator):
    """fairseq's iterator, whose saved position holds for any number of ranks.

    Rank r of W gets the batches r, r + W, r + 2W, ... of an epoch, and fairseq saves how many of *its own* batches a
    rank has seen. On another number of ranks that count stands for another one. This state says beside it how many
    ranks shared the epoch (``num_shards``), and the position is found again from the batches that all have seen.
    """

    @classmethod
    def of(cls, iterator: EpochBatchIterator, has_fillers: bool = False) -> "ResumableEpochBatchIterator":
        """Return ``iterator`` itself, of this class; in training a rank without a batch gets a filler, else nothing."""
        if has_fillers and iterator.frozen_batches and not isinstance(iterator.collate_fn, FillingCollater):
            iterator.collate_fn = FillingCollater(iterator.dataset, iterator.collate_fn, iterator.frozen_batches[0])
        iterator.__class__ = cls  # both fairseq versions construct it, with other arguments
        return iterator

    def state_dict(self) -> dict[str, Any]:
        """Return fairseq's state and the number of ranks that it counts for."""
        return {**super().state_dict(), "num_shards": self.num_shards}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the saved run stopped.

        A position between two rounds of the new ranks is moved back to the round's start: up to W - 1 batches are seen
        again, none is left out. States of stock fairseq, which do not tell their number of ranks, count as this one's.
        """
        seen_by_each = state_dict.get("iterations_in_epoch", 0)
        saved_shards = state_dict.get("num_shards") or self.num_shards
        if saved_shards != self.num_shards and seen_by_each > 0:
            seen = seen_by_each * saved_shards
            state_dict = {**state_dict, "iterations_in_epoch": seen // self.num_shards}
            self._tell(seen, saved_shards)
        super().load_state_dict(state_dict)

    def _tell(self, seen: int, saved_shards: int) -> None:
        logger.info(f"resuming on {self.num_shards} ranks what {saved_shards} saved, after {seen} batches of the epoch")
        if seen % self.num_shards:
            again = f"{seen % self.num_shards} of them will be seen again"
            logger.warning(f"{seen} batches are no multiple of {self.num_shards} ranks: {again}")
        if self.grouped_shuffling:
            logger.warning(
                f"--grouped-shuffling orders an epoch by the number of ranks ({saved_shards} when saved, "
                f"{self.num_shards} now): until this epoch ends, some batches come twice and some not at all"
            )
