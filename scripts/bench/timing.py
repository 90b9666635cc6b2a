"""Interleaved timing: two callables take turns, so that a slow moment hits both; and which operators take the time."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from mhmoe_fairseq.common import timing
from mhmoe_fairseq.common.timing import Clock, no_garbage_collection

MIN_PAIRS = 7
Operator = tuple[str, float, float]  # name, milliseconds per call, share of all operators


class Pairs(NamedTuple):
    """Seconds of two callables, pair by pair."""

    first: tuple[float, ...]
    second: tuple[float, ...]

    @property
    def medians(self) -> tuple[float, float]:
        return statistics.median(self.first), statistics.median(self.second)

    @property
    def ratio(self) -> float:
        """Median over the pairs of first / second."""
        return statistics.median(map(float.__truediv__, self.first, self.second))

    def range_text(self) -> str:
        """Smallest and largest ratio of a pair, in words: how noisy the machine was."""
        ratios = list(map(float.__truediv__, self.first, self.second))
        return f"(pairs {min(ratios):.2f} to {max(ratios):.2f})"

    def swapped(self) -> "Pairs":
        """The second as the first: ratios of speeds in place of those of times."""
        return Pairs(self.second, self.first)


def seconds(call: Callable[[], object], clock: Clock = time.perf_counter) -> float:
    """Time of one call by ``clock``, with Python's garbage collector held off."""
    with no_garbage_collection():
        start = clock()
        call()
        return clock() - start


def take_turns(turns: Sequence[Callable[[], float]], pairs: int, after: Callable[[], object]) -> Pairs:
    """Asks two for a time, once in vain and then pair by pair; every other pair starts with the second."""
    return Pairs(*map(tuple, timing.take_turns(turns, pairs, after)))


def operator_times(call: Callable[[], object], least: float = 0.02, repeats: int = 3) -> list[Operator]:
    """Returns the operators that take at least the share ``least`` of a call's CPU time, the slowest first."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(repeats):
            call()
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    total = sum(times.values())
    slowest = sorted(times.items(), key=lambda item: -item[1])
    return [(name, time / 1e3 / repeats, time / total) for name, time in slowest if time >= least * total]
