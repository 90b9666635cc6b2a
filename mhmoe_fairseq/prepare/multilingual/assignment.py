"""Where a unit goes, by a hash of its name and the seed: the same part in every language, whichever are prepared."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from ..splits import SPLITS

_NUM_STEPS = 1 << 12


def position(seed: int, purpose: str, name: str) -> float:
    """A number in [0, 1), uniform over names, drawn from ``seed`` for one ``purpose``."""
    digest = hashlib.blake2b(f"{seed}\n{purpose}\n{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


@dataclass(frozen=True)
class Assignment:
    """The split of every unit.

    Args:
        valid_fraction, test_fraction: share of the units that is held out.
    """

    seed: int
    valid_fraction: float
    test_fraction: float

    @property
    def splits(self) -> list[str]:
        """The parts that there are."""
        shares = {"train": 1.0, "valid": self.valid_fraction, "test": self.test_fraction}
        return [split for split in SPLITS if shares[split] > 0]

    def split_of(self, unit: str) -> str:
        """``train``, ``valid`` or ``test``."""
        place = position(self.seed, "split", unit)
        if place < self.test_fraction:
            return "test"
        return "valid" if place < self.test_fraction + self.valid_fraction else "train"


class Cap:
    """Bounds the size of a corpus by leaving out whole units, in an order that is the same in every language."""

    def __init__(self, seed: int):
        self._seed = seed
        self._bytes = [0] * _NUM_STEPS

    def _step(self, unit: str) -> int:
        return int(position(self._seed, "cap", unit) * _NUM_STEPS)

    def count(self, unit: str, num_bytes: int) -> None:
        """Notes text of a unit."""
        self._bytes[self._step(unit)] += num_bytes

    def limit(self, max_bytes: float) -> int:
        """How many steps of the order fit into ``max_bytes``; at least one."""
        total = 0
        for step, num_bytes in enumerate(self._bytes):
            total += num_bytes
            if total > max_bytes:
                return max(step, 1)
        return _NUM_STEPS

    def admits(self, unit: str, limit: int) -> bool:
        """Whether a unit is among the first ``limit`` steps."""
        return self._step(unit) < limit
