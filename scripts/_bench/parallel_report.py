"""What the benchmark of several processes found out, and its dated Markdown report."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from mhmoe_fairseq.analysis.plan.cluster import Cluster, Exchange, exchange

from .console import command_line, today
from .machine import describe
from .report import table, write_atomically
from .team import Sent
from .timing import Pairs
from .training import NAMES, TrainingSetting

PROMISED_RATIO = 0.85


@dataclass(frozen=True)
class ParallelResults:
    """One run's findings; ``pairs`` are seconds of the ranks and of one process.

    Attributes:
        shape: the ranks' model: ``params`` of one rank, ``layers``, ``moe``, ``expert_parallel_size``.
        params_alone: the whole model's parameters.
        losses: first update's cross entropy in bits, on the ranks and in one process.
        pairs: times of an update.
        sent: by rank, in the last update that was timed.
        profiles: seconds of one update by what was done: each rank's, then the one process's.
    """

    shape: dict
    params_alone: int
    losses: tuple[float, float]
    pairs: Pairs
    sent: list[Sent]
    profiles: list[dict[str, float]]

    @property
    def speeds(self) -> list[float]:
        """Tokens per second of the ranks / of one process, pair by pair."""
        return [1 / ratio for ratio in self.pairs.ratios]


def verdict(results: ParallelResults, ranks: int, threads: int) -> tuple[str, bool]:
    """The target as one line, and whether it is met."""
    speed = statistics.median(results.speeds)
    line = (
        f"{ranks} ranks of {threads // ranks} thread(s) train at {PROMISED_RATIO} or more of the tokens/s of one "
        f"process with {threads}: {speed:.3f} (pairs {min(results.speeds):.3f} to {max(results.speeds):.3f})"
    )
    return line, speed >= PROMISED_RATIO


def expected(shape: dict, setting: TrainingSetting, ranks: int) -> Exchange | None:
    """What ``mhmoe plan`` says one MoE layer sends; None for a dense model."""
    if shape["moe"] is None:
        return None
    cluster = Cluster(ranks, ranks, setting.tokens // ranks, link=1.0, network=1.0)
    element = 4 if setting.precision == "fp32" else 2
    return exchange(shape["moe"], cluster, shape["expert_parallel_size"], element=element, recompute=False)


def _traffic(results: ParallelResults, setting: TrainingSetting, ranks: int) -> str:
    plan, layers = expected(results.shape, setting, ranks), results.shape["layers"]
    if plan is None or plan.size == 1:
        return "Nothing: every rank has all experts."
    directions = plan.transfers * layers
    rows = [
        (
            f"rank {rank}",
            f"{sent.directions}",
            f"{sent.rows / max(sent.directions, 1):.0f}",
            f"{sent.bytes / 1e6:.3f}",
            f"{sent.count_bytes}",
        )
        for rank, sent in enumerate(results.sent)
    ]
    rows.append(("all ranks", "", f"{_mean_rows(results.sent):.0f}", f"{sum(s.bytes for s in results.sent) / 1e6:.3f}",
                 f"{sum(s.count_bytes for s in results.sent)}"))  # fmt: skip
    rows.append((
        "plan, each rank", f"{directions}", f"{plan.rows}", f"{plan.off_rank * directions / 1e6:.3f}",
        f"{plan.count_bytes * plan.count_transfers * layers}",
    ))  # fmt: skip
    head = ("", "transfers", "rows per direction and layer", "MB to other ranks", "bytes of counts")
    note = (
        "On the way out a rank sends its own rows, whose number is the plan's exactly; on the way back, those that it "
        "has computed for others, so that only the mean over the ranks is the plan's. The plan's MB are those of an "
        "even routing."
    )
    return f"{table(head, rows)}\n\n{note}"


def _mean_rows(sent: list[Sent]) -> float:
    return sum(one.rows for one in sent) / max(sum(one.directions for one in sent), 1)


def _profile(results: ParallelResults, ranks: int) -> str:
    labels = list(dict.fromkeys(label for profile in results.profiles for label in profile))
    rows = [(label, *(f"{profile.get(label, 0.0):.3f}" for profile in results.profiles)) for label in labels]
    return table(("seconds of one update", *(f"rank {rank}" for rank in range(ranks)), "one process"), rows)


def write_report(
    path: Path, results: ParallelResults, setting: TrainingSetting, *, name: str, ranks: int, threads: int
) -> None:
    """Write the report to ``path``."""
    line, is_met = verdict(results, ranks, threads)
    times = (results.pairs.first_median, results.pairs.second_median)
    speed = table(
        ("", "parameters", "s/update", "tokens/s", "of one process's speed"),
        [
            (f"{ranks} ranks, {threads // ranks} thread(s) each", f"{results.shape['params'] / 1e6:.1f}M on each",
             f"{times[0]:.3f}", f"{setting.tokens / times[0]:.0f}", f"**{statistics.median(results.speeds):.3f}**"),
            (f"one process, {threads} threads", f"{results.params_alone / 1e6:.1f}M", f"{times[1]:.3f}",
             f"{setting.tokens / times[1]:.0f}", "1"),
        ],
    )  # fmt: skip
    parts = [
        f"# Several processes against one, {today()}",
        f"Command: `{command_line()}`",
        table(("what", "value"), describe(threads)),
        "## Target",
        f"{line}: {'met' if is_met else '**missed**'}",
        "## Speed",
        f"{NAMES[name]}, {setting.size}: {setting.sentences} x {setting.tokens_per_sample} tokens per update (Zipf "
        f"draws), {setting.precision}, experts over {results.shape['expert_parallel_size']} rank(s), gloo. "
        f"{len(results.pairs.ratios)} pairs by turns after two warm-ups; seconds are medians. First loss "
        f"{results.losses[0]:.4f} bits on the ranks, {results.losses[1]:.4f} in one process.",
        speed,
        "## What passed between the ranks in an update",
        _traffic(results, setting, ranks),
        "## Where an update's time goes",
        "Waiting for another rank counts where it happens.",
        _profile(results, ranks),
        "## Flags",
        f"`{' '.join(setting.flags(name))}` with `{' '.join(setting.common_flags())}`, and `--optimizer mhmoe_adam "
        f"--ddp-backend legacy_ddp --distributed-backend gloo --dropout 0`.",
    ]
    write_atomically(path, "\n\n".join(parts) + "\n")
