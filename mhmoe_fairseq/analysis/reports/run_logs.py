"""Reading what ``fairseq-train --log-format json --log-file`` and ``fairseq-eval-lm`` wrote."""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.errors import UserError

_EVALUATED = re.compile(r"Evaluated ([\d,]+) tokens")
_RESULT = re.compile(r"Loss \(base 2\): ([\d.]+|nan|inf), Perplexity: ([\d.]+|nan|inf)")


@dataclass(frozen=True)
class TrainingLog:
    """Records of one run by number of updates, in order; keys as fairseq logs them, values as numbers.

    Attributes:
        inner: every ``--log-interval`` updates, such as ``loss``, ``gate_loss``, ``wps``.
        valid: every validation, such as ``valid_loss``, ``valid_ppl``, ``valid_moe_active``.
    """

    inner: list[dict[str, float]]
    valid: list[dict[str, float]]

    @property
    def num_updates(self) -> int:
        """Updates of the latest record."""
        return int(max(_updates(record) for record in (*self.inner[-1:], *self.valid[-1:])))

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Updates and values of ``key`` in the records that have it."""
        records = self.valid if key.startswith("valid_") else self.inner
        points = [(_updates(record), record[key]) for record in records if key in record]
        return [updates for updates, _ in points], [value for _, value in points]

    def tokens_per_second(self) -> float | None:
        """Median training speed over the log intervals; None without records.

        The first interval (warm-up) and those that a validation interrupted are left out where others remain.
        """
        speeds = {int(_updates(record)): record["wps"] for record in self.inner if "wps" in record}
        validated = [int(_updates(record)) for record in self.valid]
        ends = list(speeds)
        undisturbed = [
            speeds[end]
            for start, end in zip(ends, ends[1:])
            if not any(start <= update < end for update in validated)
        ]
        chosen = undisturbed or list(speeds.values())[1:] or list(speeds.values())
        return statistics.median(chosen) if chosen else None

    def best_valid_loss(self) -> float | None:
        """Lowest validation loss in bits per token, or None if the run never validated."""
        losses = self.curve("valid_loss")[1]
        return min(losses) if losses else None


@dataclass(frozen=True)
class Evaluation:
    """What ``fairseq-eval-lm`` printed: loss in bits per token."""

    loss: float
    perplexity: float
    tokens: int


def read_training_log(path: Path) -> TrainingLog:
    """Read a log file; records that a resumed run or fairseq's repeated handlers wrote twice count once, the last.

    Raises:
        UserError: if the file is missing or holds no record.
    """
    inner: dict[int, dict[str, float]] = {}
    valid: dict[int, dict[str, float]] = {}
    for line in _lines(path):
        record = parse_record(line)
        if "valid_num_updates" in record:
            valid[int(record["valid_num_updates"])] = record
        elif "num_updates" in record:
            inner[int(record["num_updates"])] = record
    if not inner and not valid:
        raise UserError(f"{path} has no training record: train with --log-format json --log-file {path}")
    return TrainingLog([inner[key] for key in sorted(inner)], [valid[key] for key in sorted(valid)])


def read_evaluation(path: Path) -> Evaluation:
    """Read the output of ``fairseq-eval-lm``.

    Raises:
        UserError: if the file is missing, or has no result or one of no tokens.
    """
    text = "\n".join(_lines(path))
    evaluated, result = _EVALUATED.search(text), _RESULT.search(text)
    if evaluated is None or result is None:
        raise UserError(f"{path} has no result of fairseq-eval-lm: the evaluation failed, or is still running")
    if evaluated[1] == "0":
        raise UserError(f"{path}: fairseq-eval-lm evaluated 0 tokens, so its perplexity says nothing")
    return Evaluation(float(result[1]), float(result[2]), int(evaluated[1].replace(",", "")))


def _updates(record: dict[str, float]) -> float:
    return record["valid_num_updates"] if "valid_num_updates" in record else record["num_updates"]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None


def parse_record(line: str) -> dict[str, float]:
    """The numbers of one JSON record; empty for any other line, such as the one a killed run cut short."""
    if "{" not in line:
        return {}
    try:
        values: dict[str, Any] = json.loads(line[line.index("{") :])
    except json.JSONDecodeError:
        return {}
    return {key: number for key, value in values.items() if (number := _number(value)) is not None}


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
