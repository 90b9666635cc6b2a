"""What the counts of experts by language and by modality have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from .language_statistics import overlap


class GroupLoads:
    """Base of dataclasses that hold assignments to experts by group.

    Attributes:
        checkpoint_sha256, data_digest, split: what was counted.
        load: per group, layer and expert, assignments before dropping.
    """

    checkpoint_sha256: str
    data_digest: str
    split: str
    load: list[list[list[float]]]

    @property
    def identity(self) -> tuple[str, str, str]:
        """What it belongs to: checkpoint, data, split."""
        return self.checkpoint_sha256, self.data_digest, self.split

    @property
    def load_GLE(self) -> Tensor:
        """``(groups, layers, E)`` float64."""
        return torch.tensor(self.load, dtype=torch.float64)

    def overlap_LGG(self) -> Tensor:
        """Per layer, the share of assignments that two groups have in common."""
        return overlap(self.load_GLE)
