"""Read what ``fairseq-train --log-format json --log-file`` wrote."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.errors import UserError


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
            speeds[end] for start, end in zip(ends, ends[1:]) if not any(start <= update < end for update in validated)
        ]
        chosen = undisturbed or list(speeds.values())[1:] or list(speeds.values())
        return statistics.median(chosen) if chosen else None


def read_training_log(path: Path) -> TrainingLog:
    """Read a log file; records that a resumed run or fairseq's repeated handlers wrote twice count once, the last.

    Raises:
        UserError: if the file is missing or holds no record.
    """
    inner: dict[int, dict[str, float]] = {}
    valid: dict[int, dict[str, float]] = {}
    if not path.is_file():
        raise UserError(f"{path} is missing")
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        record = parse_record(line)
        if "valid_num_updates" in record:
            valid[int(record["valid_num_updates"])] = record
        elif "num_updates" in record:
            inner[int(record["num_updates"])] = record
    if not inner and not valid:
        raise UserError(f"{path} has no training record: train with --log-format json --log-file {path}")
    return TrainingLog([inner[key] for key in sorted(inner)], [valid[key] for key in sorted(valid)])


def _updates(record: dict[str, float]) -> float:
    return record["valid_num_updates"] if "valid_num_updates" in record else record["num_updates"]


def parse_record(line: str) -> dict[str, float]:
    """The numbers of one JSON record; empty for any other line, such as the one a killed run cut short."""
    try:
        values: dict[str, Any] = json.loads(line[max(line.find("{"), 0) :])
    except json.JSONDecodeError:
        return {}
    if not isinstance(values, dict):
        return {}
    return {key: number for key, value in values.items() if (number := _number(value)) is not None}


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
