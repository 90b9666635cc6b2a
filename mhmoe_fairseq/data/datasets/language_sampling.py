"""Temperature sampling over languages: how much of each an epoch holds, and which of its blocks."""

from __future__ import annotations

import zlib

import numpy as np


def sampling_shares(sizes: np.ndarray, alpha: float) -> np.ndarray:
    """``p_l = (n_l / N)^alpha``, normalised (XLM's formula): alpha 1 keeps the sizes' shares, 0 makes all equal.

    Args:
        sizes: (L,) blocks of every language, all positive.
    """
    weights = (sizes / sizes.sum()) ** alpha
    return weights / weights.sum()


def sampled_counts(sizes: np.ndarray, alpha: float) -> np.ndarray:
    """Blocks of every language in one epoch, ``(L,)``: their sum is that of ``sizes``, each within one of its share.

    With alpha 1 they are ``sizes``: an epoch is then every block once.
    """
    total = int(sizes.sum())
    wanted = sampling_shares(sizes, alpha) * total
    counts = np.floor(wanted).astype(np.int64)
    largest_remainders = np.argsort(counts - wanted, kind="stable")
    counts[largest_remainders[: total - counts.sum()]] += 1
    return counts


def sampled_blocks(size: int, count: int, visit: int, seed: int, language: str) -> np.ndarray:
    """The blocks of one language in an epoch, ``(count,)`` numbers below ``size``.

    A language is an endless sequence of passes over its blocks, each in an order of its own; epochs take the next
    ``count`` of it. So at any time all blocks of a language have been seen equally often, give or take one, and what
    an epoch holds follows from its arguments alone.

    Args:
        visit: epochs before this one, of the same blocks.
    """
    start, end = visit * count, (visit + 1) * count
    if start == end:
        return np.empty(0, dtype=np.int64)
    first, last = start // size, (end - 1) // size
    passes = np.concatenate([_one_pass(size, number, seed, language) for number in range(first, last + 1)])
    return passes[start - first * size : end - first * size]


def _one_pass(size: int, number: int, seed: int, language: str) -> np.ndarray:
    # crc32 and not hash(), which differs from process to process.
    return np.random.default_rng([seed % 2**32, zlib.crc32(language.encode()), number]).permutation(size)
