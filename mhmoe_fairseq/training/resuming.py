"""Where a resumed training continues in its data, whatever the number of ranks."""

from __future__ import annotations

import logging
from typing import Any

from fairseq.data.iterators import EpochBatchIterator

from .fillers import FillingCollater

logger = logging.getLogger(__name__)


class ResumableEpochBatchIterator(EpochBatchIterator):
    """fairseq's iterator, whose saved position holds for any number of ranks.

    Rank r of W gets the batches r, r + W, r + 2W, ... of an epoch, and fairseq saves how many of *its own* batches a
    rank has seen. On another number of ranks that count stands for another place. This state says beside it how many
    ranks shared the epoch (``num_shards``), and the place is found again from the batches that all of them have seen.
    """

    @classmethod
    def of(cls, iterator: EpochBatchIterator, has_fillers: bool = False) -> ResumableEpochBatchIterator:
        """``iterator`` itself, made one of this class: both fairseq versions construct it, with other arguments.

        Args:
            has_fillers: whether a rank without a batch gets a filler, as in training, or nothing.
        """
        if has_fillers and iterator.frozen_batches and not isinstance(iterator.collate_fn, FillingCollater):
            iterator.collate_fn = FillingCollater(iterator.dataset, iterator.collate_fn, iterator.frozen_batches[0])
        iterator.__class__ = cls
        return iterator

    def state_dict(self) -> dict[str, Any]:
        """fairseq's state and the number of ranks that it counts for."""
        return {**super().state_dict(), "num_shards": self.num_shards}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the saved run stopped.

        A place between two rounds of the new ranks is moved back to the round's start: up to W - 1 batches are seen
        again, none is left out. States of stock fairseq, which do not tell their number of ranks, count as this
        one's.
        """
        seen_by_each = state_dict.get("iterations_in_epoch", 0)
        saved_shards = state_dict.get("num_shards", self.num_shards)
        if saved_shards != self.num_shards and seen_by_each > 0:
            seen = seen_by_each * saved_shards
            state_dict = {**state_dict, "iterations_in_epoch": seen // self.num_shards}
            self._tell(seen, saved_shards)
        super().load_state_dict(state_dict)

    def _tell(self, seen: int, saved_shards: int) -> None:
        logger.info(f"resuming on {self.num_shards} ranks what {saved_shards} saved, after {seen} batches of the epoch")
        if seen % self.num_shards:
            logger.warning(
                f"{seen} batches are no multiple of {self.num_shards} ranks: {seen % self.num_shards} of them will be "
                "seen again"
            )
        if self.grouped_shuffling:
            logger.warning(
                f"--grouped-shuffling orders an epoch by the number of ranks ({saved_shards} when saved, "
                f"{self.num_shards} now): until this epoch ends, some batches come twice and some not at all"
            )
