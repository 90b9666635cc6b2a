"""Labelled sentences and pairs of sentences as a causal language model reads them."""

from typing import Any, Sequence

import numpy as np
import torch
from fairseq.data import data_utils
from torch import Tensor

from ...common.errors import UserError
from .batching import SizedRows


class LabelledSentences(SizedRows):
    """One sequence of tokens and one class per example.

    A sentence becomes ``</s> tokens </s>``, a pair ``</s> first </s> second </s>``: lines as the language model saw
    them in pre-training, so that nothing new has to be learnt but the head, which reads the last ``</s>``.
    Examples that are longer than ``longest`` are cut, see ``cut_longest_first``; every ``</s>`` stays.

    Args:
        sentences: one or two data sets of equal length, whose items are tokens with ``</s>`` at the end.
        labels: ``(examples,)`` class ids.
        starts: ``(examples,)`` the first token of each, ``</s>`` or the symbol of a language.
        longest: tokens of an example, all counted.
        seed: of the order of examples of one length, for training; None keeps their order.

    Raises:
        UserError: if ``longest`` leaves no token of a sentence.
    """

    def __init__(
        self, sentences: Sequence[Any], labels: np.ndarray, starts: np.ndarray, *, longest: int, pad: int,
        seed: int | None = None,
    ) -> None:  # fmt: skip
        self._sentences, self._labels, self._starts = list(sentences), labels, starts
        self._pad, self._seed = pad, seed
        least = 1 + 2 * len(self._sentences)
        if longest < least:
            raise UserError(
                f"--tokens-per-sample ({longest}) must be at least {least}: the first token, and of each sentence one "
                "and the </s> after it"
            )
        full = [np.asarray(dataset.sizes) - 1 for dataset in self._sentences]
        self._kept = cut_longest_first(full, longest - 1 - len(full))
        whole, kept = (sum(lengths[1:], lengths[0]) for lengths in (full, self._kept))
        self.sizes = kept + 1 + len(full)
        self.num_cut = int((whole > kept).sum())

    def __getitem__(self, index: int) -> dict[str, Any]:
        parts = [torch.tensor([self._starts[index]])]
        for dataset, kept in zip(self._sentences, self._kept):
            tokens = dataset[index].long()
            parts += [tokens[: kept[index]], tokens[-1:]]
        return {"id": index, "tokens": torch.cat(parts), "target": int(self._labels[index])}

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch: ``net_input`` with ``src_tokens (B, S)``, padded on the right, and ``target (B,)``."""
        if not samples:
            return {}
        rows: list[Tensor] = [sample["tokens"] for sample in samples]
        return {
            "id": torch.tensor([sample["id"] for sample in samples]),
            "net_input": {"src_tokens": data_utils.collate_tokens(rows, self._pad)},
            "target": torch.tensor([sample["target"] for sample in samples]),
            "nsentences": len(samples),
            "ntokens": sum(len(row) for row in rows),
        }

    def ordered_indices(self) -> np.ndarray:
        """Return all examples, short ones first: a batch has rows of about one length."""
        order = np.arange(len(self))
        if self._seed is not None:
            np.random.default_rng(self._seed).shuffle(order)
        return order[np.argsort(self.sizes[order], kind="stable")]

    def batch_by_size(self, indices: np.ndarray, *args: Any, **kwargs: Any) -> list[np.ndarray]:
        """Return batches that hold every example: fairseq-fixed drops a last one of another multiple."""
        return super().batch_by_size(indices, *args, **{**kwargs, "required_batch_size_multiple": 1})


def cut_longest_first(lengths: Sequence[np.ndarray], room: int) -> list[np.ndarray]:
    """Return how many tokens of each sentence, of one or two ``lengths (examples,)``, stay where all may have ``room``.

    Tokens are taken from the longer sentence, one at a time, from the second of two that are as long.
    """
    if len(lengths) == 1:
        return [np.minimum(lengths[0], room)]
    first, second = lengths
    kept = np.minimum(first, np.maximum(room - second, (room + 1) // 2))
    return [kept, np.minimum(second, room - kept)]
