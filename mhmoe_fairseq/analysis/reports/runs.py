"""Trained runs on disk, several seeds of a model together; only their text files are read, never a checkpoint.

A run's folder holds ``train.log`` (``fairseq-train --log-format json --log-file``), ``record-SPLIT.json`` (``mhmoe
evaluate``, ``mhmoe zero-shot``), where experts were analysed ``routing-SPLIT.json`` (``mhmoe analyze``), the command
that trained it, ``command.sh``, and where it starts from trainings that are parts of it their updates, ``before.json``.
"""

import contextlib
import json
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...common.errors import UserError
from ...common.files import read_json
from ...data.identity import identify_data
from ...evaluation.records import Record, read_record

BEFORE = "before.json"


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
        """Updates of the latest record; 0 without records."""
        return int(max((record["num_updates"] for record in (*self.inner[-1:], *self.valid[-1:])), default=0))

    def curve(self, key: str) -> list[tuple[float, float]]:
        """Updates and value of ``key`` in each record that has it."""
        records = self.valid if key.startswith("valid_") else self.inner
        return [(record["num_updates"], record[key]) for record in records if key in record]

    def tokens(self) -> float | None:
        """Tokens, or masked positions, of the whole training; None where the log has none for an update."""
        per_update = [value for _, value in self.curve("wpb")]
        return self.num_updates * statistics.fmean(per_update) if per_update else None

    def perplexity_halfway(self) -> float | None:
        """Validation perplexity after half of the updates; None where none was measured then."""
        return dict(self.curve("valid_ppl")).get(self.num_updates / 2)

    def choices(self) -> float | None:
        """Experts that a sub-token was sent to, mean of the training; None where the log does not have it."""
        known = [value for _, value in self.curve("moe_choices")]
        return statistics.fmean(known) if known else None

    def peak_memory(self) -> float | None:
        """The most memory of the training, in GB; None where the log does not have it."""
        return max((value for _, value in self.curve("peak_gb")), default=None)

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
    """Read a log file; ``UserError`` if it is missing or holds no record.

    Records that a resumed run or fairseq's repeated handlers wrote twice count once, the last.
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


@dataclass(frozen=True)
class Run:
    """One training, or what was measured of one checkpoint.

    Attributes:
        path: the folder; ``seed-N``, or another name: runs of two models with the same one are compared.
        log: empty if there is no ``train.log``.
        records: what was evaluated, of splits first.
        routing: what ``mhmoe analyze`` measured.
        before: updates of the trainings that it is made of, by name; empty of one that is a whole itself.
    """

    path: Path
    log: TrainingLog
    records: list[Record]
    routing: list[Record]
    before: dict[str, int] = field(default_factory=dict)

    @property
    def updates(self) -> int:
        """Those of all trainings that it took, 0 without records."""
        return self.log.num_updates and self.log.num_updates + sum(self.before.values())

    def curve(self, key: str) -> list[tuple[float, float]]:
        """The log's, behind the updates that were spent before."""
        return [(updates + sum(self.before.values()), value) for updates, value in self.log.curve(key)]

    def tokens(self) -> float | None:
        """Tokens, or masked positions, of all of them, as large as the last one's updates; None where it is unknown."""
        tokens = self.log.tokens()
        return tokens and tokens * self.updates / self.log.num_updates

    def expert_record(self, split: str) -> Record | None:
        """The record with expert loads that says most: of this split, with loads by part, of ``mhmoe analyze``."""
        found = [record for record in (*self.routing, *self.records) if record.experts is not None]
        return min(found, key=lambda record: (record.split != split, not record.expert_loads.parts), default=None)


@dataclass(frozen=True)
class Model:
    """The runs of one model: its seeds, or its fine-tunings on several tasks."""

    name: str
    runs: list[Run]


def all_records(models: Iterable[Model]) -> Iterator[tuple[Run, Record]]:
    """Every record of every run of the models, with its run."""
    return ((run, record) for model in models for run in model.runs for record in run.records)


def read_model(name: str, folders: Iterable[Path]) -> Model:
    """Read a model's runs.

    Raises:
        UserError: naming what is missing or cannot be read, or two runs that measured the same without being seeds.
    """
    model = Model(name, [_read_run(folder) for folder in folders])
    measured: dict[tuple[str, str, str], Run] = {}
    for run, record in all_records([model]):
        other = measured.setdefault((run.path.name, record.what, record.split), run)
        if other is not run:
            raise UserError(
                f"runs need different folder names: {other.path} and {run.path} are both {name} (several seeds: "
                f"{name}/seed-N)"
            )
    return model


def _read_run(path: Path) -> Run:
    if not path.is_dir():
        raise UserError(f"run {path} does not exist")
    log = path / "train.log"
    records, routing = (
        [read_record(file) for file in sorted(path.glob(f"{kind}-*.json"), key=_order)]
        for kind in ("record", "routing")
    )
    if not records and not log.is_file():
        raise UserError(f"run {path} has neither train.log nor record-SPLIT.json, which mhmoe evaluate writes")
    before = read_json(path / BEFORE) if (path / BEFORE).is_file() else {}
    return Run(path, read_training_log(log) if log.is_file() else TrainingLog([], []), records, routing, before)


def _order(file: Path) -> tuple[int, str]:
    """A key that sorts ``record-SPLIT.json`` before other evaluations' ``record-WHAT-SPLIT.json``."""
    return file.stem.count("-"), file.name


def find_runs(paths: Iterable[Path], names: Sequence[str] | None = None) -> dict[str, list[Path]]:
    """Model -> its run folders, in the order given.

    Each path is a run, or a folder that holds some: MODEL/seed-N, TASK/MODEL, TASK/MODEL/seed-N, MODEL. With ``names``
    only these models, in this order.

    Raises:
        UserError: naming a path or a model that has no run.
    """
    found: dict[str, dict[Path, None]] = {}
    for path in paths:
        below = (folder for depth in ("*", "*/*", "*/*/*") for folder in path.glob(depth))
        runs = [path] if _is_run(path) else sorted(filter(_is_run, below), key=_natural)
        if not runs:
            raise UserError(f"{path} has no run: a folder with train.log, or record-SPLIT.json of mhmoe evaluate")
        for run in runs:
            whole = run.resolve()
            model = whole.parent if re.fullmatch(r"seed-\d+", whole.name) else whole
            found.setdefault(model.name, {})[run] = None
    for name in names or ():
        if name not in found:
            raise UserError(f"--names: no run of {name} (there are {', '.join(found)})")
    return {name: list(found[name]) for name in names or found}


def _is_run(folder: Path) -> bool:
    return folder.is_dir() and ((folder / "train.log").is_file() or any(folder.glob("record-*.json")))


def _natural(path: Path) -> list[tuple[int, str]]:
    """A key that sorts seed-2 before seed-10."""
    return [(int(number or 0), word) for word, number in re.findall(r"(\D+)(\d*)", path.as_posix())]


def require_one_data(models: Iterable[Model], folder: Path | None) -> None:
    """Check that records of one kind are of the same data (``folder``'s, if given) and the same visual tokenizer's ids.

    Raises:
        UserError: naming the first two runs that do not compare.
    """
    first: dict[str, tuple[Run, Record]] = {}
    expected = None if folder is None else identify_data(folder)
    for run, record in all_records(models):
        if expected is not None and record.data.get("digest") != expected.digest:
            raise UserError(
                f"{run.path} was evaluated on other data ({_source(record)}) than --data {folder} ({expected.source}, "
                f"hash {expected.digest[:12]}): their metrics do not compare"
            )
        kind = record.split if record.what == "zero-shot" else record.what  # zero-shot tasks have data of their own
        other_run, other = first.setdefault(kind, (run, record))
        for key, reason in (("digest", "other data"), ("visual_tokenizer", "another visual tokenizer")):
            if record.data.get(key) != other.data.get(key):
                raise UserError(
                    f"{run.path} was evaluated on {reason} ({_source(record)}) than {other_run.path} "
                    f"({_source(other)}): their metrics do not compare"
                )


def _source(record: Record) -> str:
    return f"{record.data.get('source')}, hash {str(record.data.get('digest'))[:12]}"


def evaluations(models: Iterable[Model]) -> dict[str, list[str]]:
    """Kind of evaluation -> its splits, validation before test."""
    found: dict[str, dict[str, None]] = {}
    for _, record in all_records(models):
        found.setdefault(record.what, {})[record.split] = None
    order = {"train": 0, "valid": 1, "test": 2}
    return {what: sorted(splits, key=lambda split: order.get(split, len(order))) for what, splits in found.items()}


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1); of a single value the deviation is None."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
