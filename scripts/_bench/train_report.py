"""What a training benchmark found out, and its dated Markdown report."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from .console import command_line, today
from .machine import describe
from .report import table, write_atomically
from .timing import Pairs
from .training import NAMES, REFERENCE, TrainingSetting

PROMISED = "mhmoe-flops"
PROMISED_RATIO = 0.95


@dataclass
class TrainResults:
    """What one run found out; ``ratio`` of a pair is seconds of the model / seconds of X-MoE.

    ``products`` has the seconds of all MoE layers' matrix products alone, as ``pairs`` those of an update.
    """

    shapes: dict[str, dict] = field(default_factory=dict)
    pairs: dict[str, Pairs] = field(default_factory=dict)
    products: dict[str, Pairs] = field(default_factory=dict)
    memory: dict[str, dict] = field(default_factory=dict)

    def seconds(self, name: str) -> float:
        """Median seconds of one update."""
        if name != REFERENCE:
            return self.pairs[name].first_median
        return statistics.median(second for pairs in self.pairs.values() for second in pairs.second)


def _is_promised(setting: TrainingSetting) -> bool:
    """Whether the target speaks of this setting; it leaves the number of samples and the data open."""
    return dataclasses.replace(setting, sentences=1, data=None) == TrainingSetting(sentences=1)


def verdict(results: TrainResults, setting: TrainingSetting) -> tuple[str, bool] | None:
    """The target as one line and whether it is met; None if it was not measured, or at another setting."""
    pairs = results.pairs.get(PROMISED)
    if pairs is None or not _is_promised(setting):
        return None
    speed = statistics.median(1 / ratio for ratio in pairs.ratios)
    low, high = sorted(1 / ratio for ratio in pairs.spread)
    line = (
        f"{NAMES[PROMISED]} trains at {PROMISED_RATIO} or more of X-MoE's tokens/s: {speed:.3f} "
        f"(pairs {low:.3f} to {high:.3f})"
    )
    return line, speed >= PROMISED_RATIO


def _speed_table(results: TrainResults, tokens: int) -> str:
    rows = []
    for name in sorted(results.shapes, key=list(NAMES).index):
        shape = results.shapes[name]
        ratio = "1" if name == REFERENCE else f"**{1 / results.pairs[name].ratio:.3f}**"
        seconds = results.seconds(name)
        rows.append(
            (
                NAMES[name],
                f"{shape['params'] / 1e6:.1f}M",
                shape["experts"],
                shape["flops"],
                f"{seconds:.3f}",
                f"{tokens / seconds:.0f}",
                ratio,
            )
        )
    head = (
        "model",
        "parameters",
        "experts x width",
        "MoE layer MFLOP/token",
        "s/update",
        "tokens/s",
        "of X-MoE's speed",
    )
    return table(head, rows)


def _products_table(results: TrainResults) -> str:
    rows = []
    for name, products in results.products.items():
        ours, theirs, update = products.first_median, products.second_median, results.pairs[name].second_median
        limit = update / (update + ours - theirs)
        rows.append((NAMES[name], f"{ours:.3f}", f"{theirs:.3f}", f"{products.ratio:.3f}", f"{limit:.3f}"))
    head = ("model", "its products, s/update", "X-MoE's", "ratio", "speed that they alone would permit")
    return table(head, rows)


def _memory_table(results: TrainResults) -> str:
    rows = []
    for name, found in results.memory.items():
        resident = "-" if found["resident"] is None else f"{found['resident']:.0f}"
        total = found["state"] + found["tensors"]
        rows.append((NAMES[name], f"{found['state']:.0f}", f"{found['tensors']:.0f}", resident, f"{total:.0f}"))
    head = ("model", "weights + Adam state", "an update's tensors", "an update, resident", "sum of the first two")
    return table(head, rows) if rows else "Not measured in this run."


def write_report(path: Path, results: TrainResults, setting: TrainingSetting, *, threads: int, pairs: int) -> None:
    """Write the report to ``path``."""
    decided = verdict(results, setting)
    flags = [f"- {NAMES[name]}: `{shape['flags']}`" for name, shape in results.shapes.items()]
    parts = [
        f"# Whole-model training benchmark, {today()}",
        f"Command: `{command_line()}`",
        table(("what", "value"), describe(threads)),
        "## Target",
        "Not measured: it is about the default setting."
        if decided is None
        else f"{decided[0]}: {'met' if decided[1] else '**missed**'}",
        "## Speed",
        f"{setting.sentences} x {setting.tokens_per_sample} tokens per update from {setting.data or 'Zipf draws'}; "
        f"forward, backward and Adam. Every model took turns with X-MoE for {pairs} pairs after one warm-up each; "
        "seconds are medians, the last column is the median over the pairs.",
        _speed_table(results, setting.tokens),
        "## What matrix products alone permit",
        "The products of all MoE layers, forward and backward, as `torch.mm` into preallocated outputs with equal rows "
        "for each expert, by turns. The last column is X-MoE's speed if everything else took X-MoE's time and these "
        "products their own: what no implementation with `torch.mm` can exceed at these shapes.",
        _products_table(results) if results.products else "There are none but X-MoE's.",
        "## Peak memory (MiB)",
        _memory_table(results),
        "## Flags",
        "\n".join(flags),
        f"All with `{' '.join(setting.common_flags())}`.",
    ]
    write_atomically(path, "\n\n".join(parts) + "\n")
