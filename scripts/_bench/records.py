"""What was measured, and which of the project's targets it meets."""

from __future__ import annotations

from dataclasses import dataclass, field

from .contenders import NAMES
from .setting import Setting
from .timing import Pairs


@dataclass(frozen=True)
class TimeRecord:
    """``first`` and ``second`` timed in interleaved pairs at one setting."""

    setting: Setting
    first: str
    second: str
    pairs: Pairs


@dataclass(frozen=True)
class MemoryRecord:
    """Peak memory of one contender in MiB; ``resident`` is None where the system cannot tell."""

    setting: Setting
    name: str
    tensors: float
    resident: float | None


@dataclass(frozen=True)
class Target:
    """One promise and what became of it."""

    promise: str
    measured: str
    met: bool


@dataclass
class Results:
    """Everything one run of the benchmark found out."""

    times: list[TimeRecord] = field(default_factory=list)
    memory: list[MemoryRecord] = field(default_factory=list)
    breakdowns: dict[str, list[tuple[str, float, float]]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def time(self, setting: Setting, second: str, first: str = "mhmoe") -> Pairs | None:
        for record in self.times:
            if (record.setting, record.first, record.second) == (setting, first, second):
                return record.pairs
        return None

    def peak(self, setting: Setting, name: str) -> MemoryRecord | None:
        for record in self.memory:
            if (record.setting, record.name) == (setting, name):
                return record
        return None


BOUND_LIMITS = {8: 1.20, 32: 1.25}
MEMORY_LIMIT = 0.8
MIXTRAL_SPEEDUP = 1.8
LINEARITY = 1.05


def targets(results: Results) -> list[Target]:
    """The promises that the measured settings can decide; settings of other sizes decide none."""
    found = [_bound(results, experts, limit) for experts, limit in BOUND_LIMITS.items()]
    for tokens in (2048, 4096):
        found += [_memory(results, tokens), _loop_time(results, tokens)]
    found.append(_linear(results))
    found += [_mixtral(results, experts) for experts in BOUND_LIMITS]
    return [target for target in found if target is not None]


def _bound(results: Results, experts: int, limit: float) -> Target | None:
    pairs = results.time(Setting(2048, experts), "gemm")
    if pairs is None:
        return None
    promise = f"forward + backward at most {limit:.2f}x the GEMM bound (T=2048, E={experts}, fp32)"
    return Target(promise, f"{pairs.ratio:.2f}x {_range(pairs)}", pairs.ratio <= limit)


def _memory_ratios(ours: MemoryRecord, other: MemoryRecord) -> tuple[str, float]:
    """Both measures as text, and the worse ratio of the two."""
    ratios = {f"tensors {ours.tensors:.0f} / {other.tensors:.0f} MiB": ours.tensors / other.tensors}
    if ours.resident is not None and other.resident:
        ratios[f"resident {ours.resident:.0f} / {other.resident:.0f} MiB"] = ours.resident / other.resident
    return ", ".join(f"{what} = {ratio:.2f}x" for what, ratio in ratios.items()), max(ratios.values())


def _memory(results: Results, tokens: int) -> Target | None:
    ours, loop = (results.peak(Setting(tokens, 8), name) for name in ("mhmoe", "loop"))
    if ours is None or loop is None:
        return None
    measured, worst = _memory_ratios(ours, loop)
    promise = f"peak memory at most {MEMORY_LIMIT}x the plain loop's (T={tokens}, E=8, fp32)"
    return Target(promise, measured, worst <= MEMORY_LIMIT)


def _loop_time(results: Results, tokens: int) -> Target | None:
    pairs = results.time(Setting(tokens, 8), "loop")
    if pairs is None:
        return None
    promise = f"no slower than the plain loop (T={tokens}, E=8, fp32)"
    return Target(promise, f"{pairs.ratio:.2f}x its time {_range(pairs)}", pairs.ratio <= 1.0)


def _linear(results: Results) -> Target | None:
    small, large = (results.peak(Setting(tokens, 8), "mhmoe") for tokens in (2048, 8192))
    if small is None or large is None:
        return None
    measured, worst = _memory_ratios(large, small)
    limit = 4 * LINEARITY
    return Target(f"peak memory linear in T (T=8192 needs at most {limit:.1f}x of T=2048)", measured, worst <= limit)


def _mixtral(results: Results, experts: int) -> Target | None:
    pairs = results.time(Setting(2048, experts), "mixtral-grouped")
    if pairs is None:
        return None
    promise = f"at least {MIXTRAL_SPEEDUP}x as fast as {NAMES['mixtral-grouped']} (T=2048, E={experts}, fp32)"
    return Target(promise, f"{1 / pairs.ratio:.2f}x", pairs.ratio <= 1 / MIXTRAL_SPEEDUP)


def _range(pairs: Pairs) -> str:
    low, high = pairs.spread
    return f"(pairs {low:.2f} to {high:.2f})"
