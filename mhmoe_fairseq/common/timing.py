"""Timing by turns, so that a slow moment of the machine hits all that are compared; the time that remains."""

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

Clock = Callable[[], float]  # seconds: the wall's, or ``time.process_time``: CPU time, summed over the threads
T = TypeVar("T")
_DELAY = 5.0  # seconds without progress shown


def tracked(items: Iterable[T], what: str, unit: str, total: int | None = None) -> Iterable[T]:
    """Returns ``items``, which in a terminal tell the time that remains once five seconds have passed.

    Args:
        total: how many they are, where ``len`` does not say.
    """
    from tqdm import tqdm  # here: help texts do not wait for it

    return tqdm(items, desc=what, unit=f" {unit}", total=total, disable=None, delay=_DELAY, leave=False)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Holds Python's garbage collector off, after it has run."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def take_turns(
    turns: Sequence[Callable[[], T]], rounds: int, after: Callable[[], object] = lambda: None
) -> list[list[T]]:
    """Asks each for a result, once in vain and then round by round; every other round starts with the last.

    Returns:
        for each of ``turns`` its results, one a round.
    """
    results: list[list[T]] = [[] for _ in turns]
    for turn in turns:
        turn()
    for index in tracked(range(rounds), "measure", "rounds"):
        for which in range(len(turns))[:: -1 if index % 2 else 1]:
            results[which].append(turns[which]())
        after()
    return results
