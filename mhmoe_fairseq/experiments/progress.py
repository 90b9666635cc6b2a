"""How much of some trainings is done, and how long the rest takes."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass
class Progress:
    """How much is done of all runs' work, and so how long the rest takes.

    Attributes:
        updates: of each run.
        hours: that each may take; where one is not known, every update counts the same.
        clock: in seconds.
    """

    updates: Mapping[str, int]
    hours: Mapping[str, float | None] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    first: dict[str, int] = field(default_factory=dict)
    done: dict[str, int] = field(default_factory=dict)
    start: float | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def reach(self, run: str, update: int) -> str:
        """Takes note of a run's update, from any thread; returns the time that remains, if it is known."""
        with self._lock:
            self.start = self.clock() if self.start is None else self.start
            self.first.setdefault(run, update)  # a resumed run's earlier updates took none of this time
            self.done[run] = update
            done = self._work(self.done)
            new = done - self._work(self.first)
            if new <= 0:
                return ""
            seconds = (self.clock() - self.start) / new * max(self._work(self.updates) - done, 0)
        return f"; about {seconds / 60:.0f} min of training left" if seconds >= 60 else ""

    def _work(self, updates: Mapping[str, int]) -> float:
        hours = {run: self.hours.get(run) for run in self.updates}
        known = {run: of / self.updates[run] for run, of in hours.items() if of}
        return sum(number * (known[run] if len(known) == len(hours) else 1) for run, number in updates.items())
