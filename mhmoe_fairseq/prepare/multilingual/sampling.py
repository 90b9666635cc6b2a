"""Text for the vocabulary: lines of all languages in shares that a temperature evens out."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Iterator, Mapping

from ...common.errors import UserError
from ..corpus import iter_lines


def check_alpha(alpha: float, flag: str) -> None:
    """``UserError`` unless 0 <= alpha <= 1."""
    if not 0 <= alpha <= 1:
        raise UserError(f"{flag} {alpha:g}: must be between 0 (all languages alike) and 1 (by their sizes)")


def language_shares(sizes: Mapping[str, int], alpha: float) -> dict[str, float]:
    """``(n_l / N) ** alpha``, normalised to 1: XLM's sampling of languages."""
    total = sum(sizes.values())
    weights = {code: (size / total) ** alpha for code, size in sizes.items()}
    return {code: weight / sum(weights.values()) for code, weight in weights.items()}


def sample_lines(texts: Mapping[str, Path], rates: Mapping[str, float], seed: int) -> Iterator[str]:
    """Yields every line of a language ``rate`` times on average: its whole part always, the rest by chance."""
    for code, text in texts.items():
        generator = random.Random(f"{seed} {code}")
        whole, rest = divmod(rates[code], 1)
        for line in iter_lines(text):
            for _ in range(int(whole) + (generator.random() < rest)):
                yield line
