"""Which measurements a run makes, and making them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from . import contenders, memory
from .records import MemoryRecord, Results, TimeRecord
from .setting import Setting
from .timing import time_pairs
from .verify import check, loop_errors, mixtral_errors

TORCHSCALE_MAX_TOKENS = 4096  # its dispatch tensors grow with T squared: 8 GB there
RIVALS = ("gemm", "loop", "torchscale", "mixtral-grouped", "mixtral-eager")
LIKE_FOR_LIKE = ("mhmoe-swiglu", "mixtral-grouped")


@dataclass(frozen=True)
class Duel:
    """Two contenders to be timed against each other at one setting."""

    setting: Setting
    first: str
    second: str


@dataclass(frozen=True)
class Plan:
    """Everything to do: what to verify, time, measure and take apart."""

    verify: tuple[Setting, ...]
    duels: tuple[Duel, ...]
    memory: tuple[tuple[Setting, str], ...]
    breakdown: tuple[Setting, ...]

    def steps(self, pairs: int) -> int:
        """Units for a progress bar."""
        return len(self.verify) + len(self.duels) * pairs + len(self.memory) + len(self.breakdown)


def runs_at(name: str, setting: Setting) -> bool:
    return name != "torchscale" or setting.tokens <= TORCHSCALE_MAX_TOKENS


def quick_plan(names: Sequence[str]) -> Plan:
    """The acceptance points: time at T=2048 (E=8 and 32) and 4096, memory at T=2048, 4096, 8192."""
    points = tuple(Setting(2048, experts) for experts in (8, 32))
    duels = [Duel(point, "mhmoe", name) for point in points for name in names]
    if "loop" in names:
        duels.append(Duel(Setting(4096, 8), "mhmoe", "loop"))
    if LIKE_FOR_LIKE[1] in names:
        duels += [Duel(point, *LIKE_FOR_LIKE) for point in points]
    measured = [(Setting(tokens, 8), name) for tokens in (2048, 4096, 8192) for name in ("mhmoe", *names)]
    return Plan(points, tuple(duels), _memory_jobs(measured), points)


def full_plan(settings: Sequence[Setting], names: Sequence[str]) -> Plan:
    """Every setting against every rival; memory at the smallest number of experts, which hardly changes it."""
    duels = [Duel(setting, "mhmoe", name) for setting in settings for name in names if runs_at(name, setting)]
    if LIKE_FOR_LIKE[1] in names:
        duels += [Duel(setting, *LIKE_FOR_LIKE) for setting in settings]
    fewest = min(setting.num_experts for setting in settings)
    measured = [(s, name) for s in settings if s.num_experts == fewest for name in ("mhmoe", *names)]
    in_fp32 = tuple(setting for setting in settings if setting.dtype == "fp32")
    return Plan(in_fp32, tuple(duels), _memory_jobs(measured), _middle(settings))


def _memory_jobs(candidates: Sequence[tuple[Setting, str]]) -> tuple[tuple[Setting, str], ...]:
    return tuple((s, name) for s, name in candidates if name != "gemm" and runs_at(name, s))


def _middle(settings: Sequence[Setting]) -> tuple[Setting, ...]:
    """The settings at the middle number of tokens: where the time goes is shown there."""
    sizes = sorted({setting.tokens for setting in settings})
    return tuple(setting for setting in settings if setting.tokens == sizes[len(sizes) // 2])


class Runner:
    """Carries out a plan and fills :class:`Results`.

    Args:
        script: the script that measures memory when started with ``--measure-memory``.
        pairs: interleaved pairs per duel.
        threads: PyTorch threads, here and in the fresh processes.
        on_progress: called with a label and the number of units just finished (0 at the start of a part).
        on_part: called after each duel or measurement, to save what exists.
    """

    def __init__(
        self,
        script: str,
        *,
        pairs: int,
        threads: int,
        on_progress: Callable[[str, int], None],
        on_part: Callable[[Results], None],
    ) -> None:
        self.script, self.pairs, self.threads = script, pairs, threads
        self.on_progress, self.on_part = on_progress, on_part
        self.results = Results()

    def run(self, plan: Plan) -> Results:
        for setting in plan.verify:
            self._verify(setting, with_mixtral=any(duel.second.startswith("mixtral") for duel in plan.duels))
        for setting, name in plan.memory:
            self._measure(setting, name)
        for duel in plan.duels:
            self._time(duel)
        for setting in plan.breakdown:
            self._take_apart(setting)
        return self.results

    def _verify(self, setting: Setting, *, with_mixtral: bool) -> None:
        self.on_progress(f"verify {setting.label()}", 0)
        what = f"our layer against the plain loop, {setting.label()}"
        self.results.errors[what] = check(loop_errors(setting), what)
        if with_mixtral:
            what = f"our SwiGLU layer against Mixtral's block, {setting.label()}"
            self.results.errors[what] = check(mixtral_errors(setting), what)
        self.on_progress("verify", 1)

    def _measure(self, setting: Setting, name: str) -> None:
        self.on_progress(f"memory {name} {setting.label()}", 0)
        sizes = ("tokens", "num_experts", "embed_dim", "num_heads", "top_k", "ffn_dim")
        arguments = ["--measure-memory", name, "--threads", str(self.threads), "--dtypes", setting.dtype]
        for size, flag in zip(sizes, ("tokens", "experts", "embed-dim", "heads", "top-k", "ffn-dim")):
            arguments += [f"--{flag}", str(getattr(setting, size))]
        try:
            found = memory.in_fresh_process(self.script, arguments)
        except RuntimeError as error:  # as when a rival needs more memory than the machine has
            if name.startswith("mhmoe"):
                raise
            self.results.notes.append(f"Memory of {contenders.NAMES[name]} at {setting.label()}: {error}")
        else:
            self.results.memory.append(MemoryRecord(setting, name, found["tensors"], found["resident"]))
        self._done("memory", 1)

    def _time(self, duel: Duel) -> None:
        label = f"time {duel.first} / {duel.second} {duel.setting.label()}"
        self.on_progress(label, 0)
        gc.collect()
        first = contenders.build(duel.first, duel.setting)
        second = contenders.build(duel.second, duel.setting)
        pairs = time_pairs(first, second, pairs=self.pairs, after_pair=lambda: self.on_progress(label, 1))
        self.results.times.append(TimeRecord(duel.setting, duel.first, duel.second, pairs))
        self._done(label, 0)

    def _take_apart(self, setting: Setting) -> None:
        self.on_progress(f"profile {setting.label()}", 0)
        step = contenders.build("mhmoe", setting)
        self.results.breakdowns[setting.label()] = operator_times(step)
        self._done("profile", 1)

    def _done(self, label: str, units: int) -> None:
        self.on_progress(label, units)
        self.on_part(self.results)


def operator_times(call: Callable[[], object], top: int = 8, repeats: int = 3) -> list[tuple[str, float, float]]:
    """The operators that take most of a call: (name, milliseconds per call, share of all operators)."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(repeats):
            call()
    averages = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in averages)
    return [
        (event.key, event.self_cpu_time_total / 1e3 / repeats, event.self_cpu_time_total / total)
        for event in averages[:top]
    ]
