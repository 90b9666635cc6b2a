"""Interleaved timing: two callables take turns in one process, so that a slow moment hits both."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

MIN_PAIRS = 7


@dataclass(frozen=True)
class Pairs:
    """Seconds of two callables, pair by pair."""

    first: tuple[float, ...]
    second: tuple[float, ...]

    @property
    def first_median(self) -> float:
        return statistics.median(self.first)

    @property
    def second_median(self) -> float:
        return statistics.median(self.second)

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.first, self.second)]

    @property
    def ratio(self) -> float:
        """Median over the pairs of first / second."""
        return statistics.median(self.ratios)

    def range_text(self) -> str:
        """Smallest and largest ratio of a pair, in words: how noisy the machine was."""
        return f"(pairs {min(self.ratios):.2f} to {max(self.ratios):.2f})"

    def swapped(self) -> "Pairs":
        """The second as the first: ratios of speeds in place of those of times."""
        return Pairs(self.second, self.first)


def seconds(call: Callable[[], object]) -> float:
    """Wall-clock time of one call, with Python's garbage collector held off."""
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    finally:
        gc.enable()


def time_pairs(
    first: Callable[[], object],
    second: Callable[[], object],
    *,
    pairs: int = MIN_PAIRS,
    warmup: int = 1,
    after_pair: Callable[[], object] | None = None,
) -> Pairs:
    """Times ``first`` and ``second`` in turns, after ``warmup`` untimed calls of each.

    Args:
        after_pair: called after every pair, as for a progress bar.
    """
    for _ in range(warmup):
        first()
        second()
    return take_turns(lambda: seconds(first), lambda: seconds(second), pairs, after_pair)


def take_turns(
    first: Callable[[], float], second: Callable[[], float], pairs: int, after_pair: Callable[[], object] | None = None
) -> Pairs:
    """Asks both for a time, pair by pair; every other pair starts with the second."""
    times: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            times[which].append((first, second)[which]())
        if after_pair:
            after_pair()
    return Pairs(tuple(times[0]), tuple(times[1]))
