"""Read what ``fairseq-train --log-format json --log-file`` wrote."""

import contextlib
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.errors import UserError


@dataclass(frozen=True)
class TrainingLog:
    """Records of one run in order; keys as fairseq logs them, values as numbers, ``num_updates`` in each.

    Attributes:
        inner: every ``--log-interval`` updates, such as ``loss``, ``gate_loss``, ``wps``.
        valid: every validation, such as ``valid_loss``, ``valid_ppl``, ``valid_moe_active``.
    """

    inner: list[dict[str, float]]
    valid: list[dict[str, float]]

    @property
    def num_updates(self) -> int:
        """Updates of the latest record."""
        return int(max(record["num_updates"] for record in (*self.inner[-1:], *self.valid[-1:])))

    def curve(self, key: str) -> list[tuple[float, float]]:
        """Updates and value of ``key`` in each record that has it."""
        records = self.valid if key.startswith("valid_") else self.inner
        return [(record["num_updates"], record[key]) for record in records if key in record]

    def tokens_per_second(self) -> float | None:
        """Median training speed over the log intervals; None without records.

        The first interval (warm-up) and those that a validation interrupted are left out where others remain.
        """
        speeds, validated = self.curve("wps"), [record["num_updates"] for record in self.valid]
        undisturbed = [
            speed
            for (start, _), (end, speed) in zip(speeds, speeds[1:])
            if not any(start <= update < end for update in validated)
        ]
        chosen = undisturbed or [speed for _, speed in speeds[1:] or speeds]
        return statistics.median(chosen) if chosen else None


def read_training_log(path: Path) -> TrainingLog:
    """Read a log file; records that a resumed run or fairseq's repeated handlers wrote twice count once, the last.

    Raises:
        UserError: if the file is missing or holds no record.
    """
    inner: dict[float, dict[str, float]] = {}
    valid: dict[float, dict[str, float]] = {}
    if not path.is_file():
        raise UserError(f"{path} is missing")
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        record = parse_record(line)
        if "valid_num_updates" in record:
            valid[record["valid_num_updates"]] = {**record, "num_updates": record["valid_num_updates"]}
        elif "num_updates" in record:
            inner[record["num_updates"]] = record
    if not inner and not valid:
        raise UserError(f"{path} has no training record: train with --log-format json --log-file {path}")
    return TrainingLog([inner[key] for key in sorted(inner)], [valid[key] for key in sorted(valid)])


def parse_record(line: str) -> dict[str, float]:
    """The numbers of one JSON record; empty for any other line, such as the one a killed run cut short."""
    try:
        values: Any = json.loads(line[max(line.find("{"), 0) :])
    except json.JSONDecodeError:
        return {}
    numbers = {}
    for key, value in values.items() if isinstance(values, dict) else ():
        with contextlib.suppress(TypeError, ValueError):
            numbers[key] = float(value)
    return numbers
