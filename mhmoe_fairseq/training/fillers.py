"""Batches that only fill up a rank's share of an epoch.

fairseq deals an epoch's batches out to the ranks one after another. Where their number leaves a remainder some ranks
get one batch less, and since the others wait for them in every exchange they compute a copy of an earlier one. fairseq
itself asks only the last batch of an update whether it is such a filler, and then drops all of the rank's batches of
that update from the number of samples by which the gradient is divided, and from what is logged. Nor does it tell
anybody in a validation. Here a filler is a batch like others that says that it does not count, and counts nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from fairseq.data import FairseqDataset
from torch import Tensor

_COUNTED = "counted"  # criterions read it too, of a batch and of its parts


class FillingCollater:
    """A data set's collate function that makes a filler of no samples, where the data set's own makes nothing.

    Args:
        dataset: where the filler comes from.
        collate: the data set's own function.
        samples: numbers of the samples that make a filler.
    """

    def __init__(self, dataset: FairseqDataset, collate: Callable[[list], Any], samples: Sequence[int]) -> None:
        self._dataset = dataset
        self._collate = collate
        self._samples = samples

    def __call__(self, samples: list[Any]) -> Any:
        """One batch."""
        if samples:
            return self._collate(samples)
        return {**self._collate([self._dataset[number] for number in self._samples]), _COUNTED: False}


def is_filler(sample: dict[str, Any]) -> bool:
    """Whether a batch is there only for the calls that all ranks make together."""
    return not sample.get(_COUNTED, True)


def without_figures(outcome: tuple[Tensor, Any, dict[str, Any]]) -> tuple[Tensor, Any, dict[str, Any]]:
    """Loss, sample size and what is logged of a filler: the same keys as other ranks have, all zero."""
    loss, sample_size, log = outcome
    zeros = {key: torch.zeros_like(value) if torch.is_tensor(value) else 0 for key, value in log.items()}
    return torch.zeros_like(loss), sample_size * 0, zeros
