"""Several seeds of every model: mean and standard deviation over run folders named MODEL/seed-N."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from pathlib import Path

from ...common.errors import UserError
from ...common.tables import BITS_PER_BYTE, MISSING, markdown_table, millions, percent, without_column
from .summary import Summary

_SEED = re.compile(r"seed-(\d+)")


def find_seed_runs(paths: list[Path]) -> list[Path]:
    """Run folders MODEL/seed-N among ``paths``: each is one, or holds some (MODEL/, or a folder of MODEL/).

    Raises:
        UserError: naming a path that has none.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise UserError(f"run {path} does not exist")
        if _SEED.fullmatch(path.name):
            runs = [path]
        else:
            below = [*path.glob("seed-*"), *path.glob("*/seed-*")]
            runs = [run for run in below if _SEED.fullmatch(run.name)]
        if not runs:
            raise UserError(f"{path} has no run folder named MODEL/seed-N")
        found += sorted(runs, key=lambda run: (run.parent.name, seed_of(run)))
    return list(dict.fromkeys(found))


def seed_of(run: Path) -> int:
    """N of MODEL/seed-N."""
    return int(_SEED.fullmatch(run.name)[1])


def model_of(run: Path) -> str:
    """MODEL of MODEL/seed-N."""
    return run.resolve().parent.name


def mean_and_deviation(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); no deviation of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def group_by_model(summaries: list[Summary]) -> dict[str, list[Summary]]:
    """Model -> its runs, in the order given."""
    groups: dict[str, list[Summary]] = {}
    for summary in summaries:
        groups.setdefault(model_of(summary.run.path), []).append(summary)
    return groups


def figures(group: list[Summary], figure: Callable[[Summary], float | None]) -> list[float]:
    """One figure of every seed that has it."""
    return [value for summary in group if (value := figure(summary)) is not None]


def paired_change(group: list[Summary], reference: list[Summary], split: str) -> list[float]:
    """Relative change of perplexity against the reference's run with the same seed."""
    by_seed = {seed_of(summary.run.path): summary.perplexity(split) for summary in reference}
    changes = []
    for summary in group:
        ours, theirs = summary.perplexity(split), by_seed.get(seed_of(summary.run.path))
        if ours is not None and theirs is not None:
            changes.append(ours / theirs - 1)
    return changes


def aggregate_table(groups: dict[str, list[Summary]], reference: str | None) -> str:
    """A row for every model; with ``reference``, the paired change of test perplexity against it.

    Raises:
        UserError: if there is no such model.
    """
    if reference is not None and reference not in groups:
        raise UserError(f"--reference ({reference}) must be one of {', '.join(groups)}")
    header = ["model", "seeds", "updates", "lr", "parameters", "active", "MFLOPs/token", "valid ppl", "test ppl"]
    header += [BITS_PER_BYTE, "active experts", "effective experts"]
    if reference is not None:
        header.append(f"test ppl against {reference}")
    rows = []
    for model, group in groups.items():
        counts = group[0].counts
        row = [
            model,
            str(len(group)),
            _same(str(summary.run.log.num_updates) for summary in group),
            _same(",".join(f"{lr:g}" for lr in summary.run.settings["optimization"]["lr"]) for summary in group),
            millions(counts.total),
            millions(counts.active),
            f"{counts.flops_per_token / 1e6:,.2f}",
            spread(figures(group, lambda summary: summary.perplexity("valid"))),
            spread(figures(group, lambda summary: summary.perplexity("test"))),
            spread(figures(group, lambda summary: summary.bits_per_byte("test")), digits=4),
            _mean_percent(figures(group, Summary.active_share)),
            _mean_percent(figures(group, Summary.effective_share)),
        ]
        if reference is not None:
            row.append(_change(paired_change(group, groups[reference], "test")) if model != reference else MISSING)
        rows.append(row)
    if all(summary.run.data.has_images for group in groups.values() for summary in group):
        header, rows = without_column(header, rows, BITS_PER_BYTE)
    return markdown_table(header, rows)


def spread(values: list[float], digits: int = 2) -> str:
    """``12.34 ± 0.05``; the deviation only with two seeds or more."""
    if not values:
        return MISSING
    middle, deviation = mean_and_deviation(values)
    return f"{middle:,.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def _change(changes: list[float]) -> str:
    if not changes:
        return MISSING
    middle, deviation = mean_and_deviation(changes)
    return f"{100 * middle:+.1f} %" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def _mean_percent(values: list[float]) -> str:
    return percent(statistics.fmean(values)) if values else MISSING


def _same(values) -> str:
    """The value that all share, or all values."""
    return " / ".join(dict.fromkeys(values))
