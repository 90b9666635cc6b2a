"""Blocks of text that say which domain each token is of."""

import copy
from typing import Any

import numpy as np
import torch
from fairseq.data import MonolingualDataset, TokenBlockDataset
from torch import Tensor

from .batching import WholeMonolingualDataset


class DomainBlocks(WholeMonolingualDataset):
    """A text's blocks with ``net_input["domain"]``, ``(B, S)``: at each position the domain of the token it predicts.

    So a block may hold documents of several domains, wherever it is cut, and the first token of a document is its own
    domain's. Padding has number 0.
    """

    labels: Any

    @classmethod
    def labelled(cls, dataset: MonolingualDataset, domains: np.ndarray) -> "DomainBlocks":
        """Return ``dataset`` with the domains of the lines that its blocks are cut from, ``(lines,)``."""
        whole = cls.of(dataset)
        whole.labels = copy.copy(dataset.dataset)  # the same cuts through other lines
        whole.labels.dataset = _LabelledLines(dataset.dataset.dataset.sizes, domains)
        whole.labels.include_targets = False
        return whole

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        labels = self.labels[index]
        more = len(sample["source"]) - len(labels)  # --add-bos-token
        return {**sample, "domain": torch.cat([labels[:1].expand(more), labels])}

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch."""
        batch = super().collater(samples)
        if batch:
            add_domains(batch, [sample["domain"] for sample in samples])
        return batch


def add_domains(batch: dict[str, Any], domains: list[Tensor]) -> None:
    """Put ``net_input["domain"]`` into a batch: of each row one number, or one for every position."""
    numbers = torch.zeros_like(batch["net_input"]["src_tokens"])
    for row, domain in zip(numbers, domains):
        row[: domain.numel() if domain.dim() else None] = domain
    batch["net_input"]["domain"] = numbers


def of_one_domain(dataset: MonolingualDataset, chosen: np.ndarray, tokens: int, break_mode: str) -> MonolingualDataset:
    """Return blocks of ``dataset``'s chosen lines alone.

    Args:
        chosen: bool ``(lines,)``.
        tokens, break_mode: how blocks are cut, as the data set's own.
    """
    lines = _ChosenLines(dataset.dataset.dataset, np.flatnonzero(chosen))
    cut = {"pad": dataset.dataset.pad, "eos": dataset.dataset.eos, "break_mode": break_mode, "include_targets": True}
    part = copy.copy(dataset)
    part.dataset = TokenBlockDataset(lines, lines.sizes, tokens, **cut)
    part.sizes = np.array(part.dataset.sizes)
    return part


class _ChosenLines:
    """Some lines of a text, numbered through."""

    def __init__(self, lines: Any, indices: np.ndarray) -> None:
        self._lines, self._indices = lines, indices
        self.sizes = lines.sizes[indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Tensor:
        return self._lines[int(self._indices[index])]


class _LabelledLines:
    """In place of a text's lines: as many times its domain's number as a line has tokens."""

    def __init__(self, sizes: np.ndarray, domains: np.ndarray) -> None:
        self._sizes, self._domains = sizes, domains

    def __getitem__(self, line: int) -> Tensor:
        return torch.full((int(self._sizes[line]),), int(self._domains[line]))
