"""The blocks of several languages as one fairseq dataset, and temperature sampling: how much of each an epoch holds."""

from typing import Any

import numpy as np
import torch
from fairseq.data import LMContextWindowDataset, MonolingualDataset

from .batching import SizedRows, WholeBatches, passes
from .domains import add_domains


class LanguagesDataset(WholeBatches, SizedRows):
    """Every block of every language, numbered through; no block has text of two languages.

    A batch has fairseq's keys, ``languages``, ``(B,)``: the number of each row's language in the task's list, and
    ``characters``, ``(B,)``, if they are known for all languages: what each row's targets stand for, on average.

    Args:
        parts, numbers: language -> its blocks, and its number in the task's list.
        symbols: language -> the word that stands in place of the context before a block's first target; where there is
            none that context is left as it is. Targets stay the same, so that perplexities compare.
        characters: language -> characters of its text, where known.

    Attributes:
        experts: language -> the number of its expert, for models that have one for each; else empty.
    """

    experts: dict[str, int] = {}

    def __init__(
        self,
        parts: dict[str, MonolingualDataset],
        numbers: dict[str, int],
        symbols: dict[str, int] | None = None,
        characters: dict[str, float] | None = None,
    ) -> None:
        self.parts, self.languages, self.symbols = parts, list(parts), symbols or {}
        self.sizes = np.concatenate([part.sizes for part in parts.values()])
        self.characters = characters if characters and set(parts) <= set(characters) else {}
        self._per_token = {name: count / parts[name].sizes.sum() for name, count in self.characters.items()}
        self._numbers = torch.tensor([numbers[language] for language in parts])
        self.starts = np.cumsum([0, *map(len, parts.values())])

    def __getitem__(self, index: int) -> dict[str, Any]:
        position = int(self.language_at(index))
        language = self.languages[position]
        sample = self.parts[language][int(index - self.starts[position])]
        if language in self.symbols:
            source = sample["source"].clone()
            source[0] = self.symbols[language]
            sample["source"] = source
        sample = {**sample, "id": int(index), "language": self._numbers[position]}
        if self.experts:
            sample["domain"] = torch.tensor(self.experts[language])
        if self.characters:
            sample["characters"] = len(sample["target"]) * self._per_token[language]
        return sample

    def language_at(self, indices: int | np.ndarray) -> np.ndarray:
        """Return which of ``languages`` blocks belong to; the first block of each is in ``starts``."""
        return np.searchsorted(self.starts, indices, side="right") - 1

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch."""
        if not samples:
            return {}
        batch = self.parts[self.languages[0]].collater(samples)  # all parts are made with the same settings
        batch["languages"] = torch.stack([sample["language"] for sample in samples])
        if self.experts:
            add_domains(batch, [sample["domain"] for sample in samples])
        if self.characters:
            batch["characters"] = torch.tensor([sample["characters"] for sample in samples])
        return batch

    def ordered_indices(self) -> np.ndarray:
        """Return all blocks by length, equally long ones in random order, as fairseq orders the blocks of one text."""
        return np.lexsort([np.random.permutation(len(self)), self.sizes])


class SampledLanguagesDataset(LanguagesDataset):
    """The training set: an epoch holds as many blocks of each language as temperature sampling gives it.

    Which ones, and in which order, follows from the seed and the epoch alone.

    Args:
        alpha: exponent of the sizes, see ``sampling_shares``.
        seed: of the choice and of the order.
        num_shards: of the data: epoch e reads shard (e - 1) modulo this.
    """

    can_reuse_epoch_itr_across_epochs = False  # each epoch has its own batches

    def __init__(self, *args: Any, alpha: float, seed: int, num_shards: int = 1) -> None:
        super().__init__(*args)
        self.seed, self.num_shards, self.epoch = seed, num_shards, 1
        self.counts = sampled_counts(np.diff(self.starts), alpha)

    def set_epoch(self, epoch: int) -> None:
        """fairseq's hook before an epoch."""
        super().set_epoch(epoch)
        self.epoch = epoch

    def ordered_indices(self) -> np.ndarray:
        """Return this epoch's blocks, some of them several times, by length and equally long ones in random order."""
        visit = (self.epoch - 1) // self.num_shards
        chosen = [
            self.starts[position] + passes(len(part), self.counts[position], visit, self.seed, language)
            for position, (language, part) in enumerate(self.parts.items())
        ]
        indices = np.concatenate(chosen)
        order = np.random.default_rng([self.seed % 2**32, self.epoch]).permutation(len(indices))
        return indices[np.lexsort([order, self.sizes[indices]])]


class LanguageContextDataset(WholeBatches, LMContextWindowDataset):
    """fairseq's ``--context-window``, whose context never comes from another language.

    Batches do not mix languages, and a language's first batch starts without context.
    """

    _last_language: int | None = None

    def batch_by_size(self, indices: np.ndarray, *args: object, **kwargs: object) -> list[np.ndarray]:
        """Return batches of ``indices``, which come in order, apart by language."""
        batches: list[np.ndarray] = []
        for run in np.split(indices, np.flatnonzero(np.diff(self.dataset.language_at(indices))) + 1):
            batches += super().batch_by_size(run, *args, **kwargs)
        return batches

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch with the context that the same language's previous batch left."""
        language = int(samples[0]["language"])
        if language != self._last_language:
            self.prev_tokens = np.empty([0])
            self._last_language = language
        return super().collater(samples)


def sampling_shares(sizes: np.ndarray, alpha: float) -> np.ndarray:
    """``p_l = (n_l / N)^alpha``, normalised (XLM's formula): alpha 1 keeps the sizes' shares, 0 makes all equal.

    Args:
        sizes: (L,) blocks of every language, all positive.
    """
    weights = (sizes / sizes.sum()) ** alpha
    return weights / weights.sum()


def sampled_counts(sizes: np.ndarray, alpha: float) -> np.ndarray:
    """Return each language's blocks in an epoch, ``(L,)``: as many as ``sizes`` in all, each within one of its share.

    With alpha 1 they are ``sizes``: an epoch is then every block once.
    """
    total = int(sizes.sum())
    wanted = sampling_shares(sizes, alpha) * total
    counts = np.floor(wanted).astype(np.int64)
    largest_remainders = np.argsort(counts - wanted, kind="stable")
    counts[largest_remainders[: total - counts.sum()]] += 1
    return counts
