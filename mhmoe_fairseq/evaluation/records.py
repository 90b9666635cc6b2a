"""One record per evaluation: what was measured, on what, with what; the only format of results in this package.

A record is a JSON file, ``record-SPLIT.json`` beside the checkpoint unless told otherwise. ``mhmoe evaluate``,
``mhmoe zero-shot`` and ``mhmoe analyze`` write them, ``mhmoe report`` and ``mhmoe reproduce`` read them. Reading needs
no PyTorch.
"""

import dataclasses
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..common.files import read_json, write_json
from ..common.provenance import commit, timestamp, versions

SCHEMA = "mhmoe-record/1"
KINDS = (
    "perplexity", "masked", "classification", "questions", "statements", "captions", "retrieval",
    "image classification", "zero-shot", "routing", "polysemy", "speed", "domain mixture",
    "one-token mixture", "one domain", "domain mixture by share", "one-token mixture by share",
)  # fmt: skip
ACTIVE_THRESHOLD = 0.01
_PACKAGES = (  # that a metric may depend on
    "mhmoe-fairseq", "torch", "fairseq", "fairseq-fixed", "torchscale", "sentencepiece", "tiktoken", "lm-eval",
    "pycocoevalcap",
)  # fmt: skip


@dataclass(frozen=True)
class Metric:
    """One measured number.

    Attributes:
        value: in ``unit``.
        unit: such as ``perplexity``, ``bits/token``, ``%``.
        stderr: its standard error in the same unit; None where it is unknown.
        count: of tokens, examples or images it was measured on.
        baselines: what guesses that see less reach on the same examples, by name (``majority``, ``question only``).
    """

    value: float
    unit: str
    stderr: float | None = None
    count: int | None = None
    baselines: dict[str, float] = field(default_factory=dict)


def mean_percent(scores: Sequence[float], baselines: dict[str, float] | None = None) -> Metric:
    """The mean of scores from 0 to 1, of at least one independent example, in percent with its standard error."""
    mean = sum(scores) / len(scores)
    deviation = math.sqrt(sum((score - mean) ** 2 for score in scores) / len(scores))
    return Metric(100 * mean, "%", 100 * deviation / math.sqrt(len(scores)), len(scores), baselines or {})


def mean_of(metrics: Sequence[Metric]) -> Metric:
    """The mean of several sets' percentages, with the standard error of the examples alone."""
    value = sum(metric.value for metric in metrics) / len(metrics)
    stderr = math.sqrt(sum((metric.stderr or 0.0) ** 2 for metric in metrics)) / len(metrics)
    return Metric(value, "%", stderr, sum(metric.count or 0 for metric in metrics), metrics[0].baselines)


@dataclass(frozen=True)
class LayerLoads:
    """How one pool of experts of one MoE layer was used.

    Attributes:
        layer: index of the layer in the model, from 0.
        loads: per expert, assignments of sub-tokens before dropping.
        part: the language or modality that was counted; None for the whole split.
        pool: ``image`` or ``text`` where a layer has experts of its own for each, else None.
        dropped: assignments dropped for lack of capacity.
        entropy: the router's mean softmax entropy in nats; None where it was not measured.
    """

    layer: int
    loads: list[float]
    part: str | None = None
    pool: str | None = None
    dropped: float = 0.0
    entropy: float | None = None

    @property
    def name(self) -> str:
        """The layer from 1, its pool beside it."""
        return f"{self.layer + 1} {self.pool}" if self.pool else f"{self.layer + 1}"

    @property
    def overflow(self) -> float:
        """Share of assignments that were dropped."""
        return self.dropped / max(sum(self.loads), 1.0)


def _together(rows: Sequence[LayerLoads]) -> LayerLoads:
    """One layer's rows as one, without a part; each part's entropy has the weight of its assignments."""
    totals = [sum(row.loads) for row in rows]
    loads = [sum(of_expert) for of_expert in zip(*(row.loads for row in rows))]
    known = [row.entropy * total for row, total in zip(rows, totals) if row.entropy is not None]
    entropy = sum(known) / sum(totals) if len(known) == len(rows) and any(totals) else None
    return LayerLoads(rows[0].layer, loads, None, rows[0].pool, sum(row.dropped for row in rows), entropy)


@dataclass(frozen=True)
class ExpertLoads:
    """The experts of a model over a split: a row per layer and pool for the whole, then for each part."""

    layers: list[LayerLoads]

    @classmethod
    def of_parts(cls, rows: Sequence[LayerLoads]) -> "ExpertLoads":
        """Returns the rows of all parts together, layer by layer, and behind them those of each part."""
        pools: dict[tuple[int, str | None], list[LayerLoads]] = {}
        for row in rows:
            pools.setdefault((row.layer, row.pool), []).append(row)
        return cls([*(_together(pools[key]) for key in sorted(pools, key=lambda of: (of[0], of[1] or ""))), *rows])

    def of(self, part: str | None = None) -> "ExpertLoads":
        """The rows of one part, or of the whole split."""
        return ExpertLoads([row for row in self.layers if row.part == part])

    @property
    def parts(self) -> list[str]:
        """Names of the parts that were counted, in their order."""
        return list(dict.fromkeys(row.part for row in self.layers if row.part is not None))

    def active(self, threshold: float = ACTIVE_THRESHOLD) -> list[float]:
        """Per row, the share of experts with at least ``threshold`` of the uniform load."""
        return self._statistic("active_share", threshold)

    def effective(self) -> list[float]:
        """Per row, ``exp(entropy of the load) / E``."""
        return self._statistic("effective_share")

    def max_over_mean(self) -> list[float]:
        """Per row, the largest load over the mean load."""
        return self._statistic("load_max_over_mean")

    def _statistic(self, name: str, *arguments: float) -> list[float]:
        import torch

        from ..moe import stats

        rows = (torch.tensor(row.loads, dtype=torch.float64) for row in self.layers)
        return [float(getattr(stats, name)(row, *arguments)) for row in rows]


@dataclass(frozen=True)
class Record:
    """One evaluation.

    Attributes:
        what: one of ``KINDS``.
        split: the data split, such as ``test``; of zero-shot tasks their name, of speed the workload, ``4x7+16``.
        metrics: of the whole split by name; the main one first.
        parts: metrics by language, modality or task.
        experts: None of a dense model, or where they were not counted.
        absent: metrics that could not be measured, and why.
        settings: how it was measured: beam, candidates, ...
        model: ``arch``, ``settings`` (flags by name) and ``counts`` (parameters, active, FLOPs per token).
        data: ``path``, ``digest``, ``source``, ``kind``, ``split``.
        checkpoint: ``path``, ``sha256``, ``updates``.
        provenance: ``command``, ``commit``, ``versions``, ``date``, ``device``, ``precision``; ``earlier``: dates of
            evaluations of the same test split whose record this one took the place of.
    """

    what: str
    split: str
    metrics: dict[str, Metric]
    parts: dict[str, dict[str, Metric]] = field(default_factory=dict)
    experts: ExpertLoads | None = None
    absent: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def main(self) -> Metric:
        """The first metric of the whole split, which comparisons are about."""
        return next(iter(self.metrics.values()))

    @property
    def expert_loads(self) -> ExpertLoads:
        """``experts`` of a record that is known to have them."""
        assert self.experts is not None, "a record with expert loads"
        return self.experts

    def values(self, metric: str) -> dict[str, float]:
        """One metric's value by part, where it was measured."""
        return {part: metrics[metric].value for part, metrics in self.parts.items() if metric in metrics}


def record_file(folder: Path, split: str) -> Path:
    """Where a split's record lies in a run's folder."""
    return folder / f"record-{split}.json"


def write_record(path: Path, record: Record) -> None:
    """Write a record under a temporary name, then rename it."""
    write_json(path, {"schema": SCHEMA, **dataclasses.asdict(record)})


def read_record(path: Path) -> Record:
    """Read what ``write_record`` wrote.

    Raises:
        UserError: the file is missing or is no record; names the file, the field and the rule.
    """
    if not path.is_file():
        raise UserError(f"record {path} does not exist: mhmoe evaluate writes it")
    kept = read_json(path)
    schema = kept.pop("schema", None) if isinstance(kept, dict) else None
    if schema != SCHEMA:
        raise UserError(f"{path}: schema ({schema}) must be {SCHEMA}: it is no record of mhmoe evaluate")
    try:
        kept["metrics"] = _metrics(kept["metrics"])
        kept["parts"] = {part: _metrics(metrics) for part, metrics in kept["parts"].items()}
        if kept.get("experts") is not None:
            kept["experts"] = ExpertLoads([LayerLoads(**row) for row in kept["experts"]["layers"]])
        record = Record(**kept)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: {error} (a field of {SCHEMA} is missing, unknown or malformed)") from error
    if (problem := _problem(record)) is not None:
        raise UserError(f"{path}: {problem}")
    return record


def looks_at_test(path: Path, record: Record) -> list[str]:
    """Returns when the record of a test split that lies at ``path``, and those before it, were measured, if any."""
    try:
        before = read_record(path) if record.split.startswith("test") and path.is_file() else None
    except UserError:  # half a file is none
        return []
    if before is None or (before.what, before.split) != (record.what, record.split):
        return []
    return [*before.provenance.get("earlier", []), str(before.provenance.get("date"))]


def read_kept(path: Path, origin: tuple[str, str, str, str]) -> Record | None:
    """Returns a record that is there already, of this origin; None where there is none or another's.

    Args:
        origin: the checkpoint's SHA-256, the data's digest, the split and the precision that it has to have.
    """
    if not path.is_file():
        return None
    record = read_record(path)
    known = (record.checkpoint.get("sha256"), record.data.get("digest"), record.split)
    return record if (*known, record.provenance.get("precision")) == origin else None


def _metrics(kept: Mapping[str, Any]) -> dict[str, Metric]:
    return {name: Metric(**metric) for name, metric in kept.items()}


def _problem(record: Record) -> str | None:
    """The rule that a record's values break, behind the field's name; None if there is none."""
    if record.what not in KINDS:
        return f"what ({record.what}) must be one of {', '.join(KINDS)}"
    if not record.metrics:
        return "metrics must hold at least one"
    for name, metric in [*record.metrics.items(), *(item for part in record.parts.values() for item in part.items())]:
        if isinstance(metric.value, bool) or not isinstance(metric.value, (int, float)):
            return f"metric {name}: value ({metric.value!r}) must be a number"
    for name in ("absent", "settings", "model", "data", "checkpoint", "provenance"):
        if not isinstance(getattr(record, name), dict):
            return f"{name} must be an object"
    return None


def describe_origin(device: str, precision: str) -> dict[str, Any]:
    """The provenance of a record that is measured now, by this process."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit(),
        "versions": versions(_PACKAGES),
        "date": timestamp(),
        "device": device,
        "precision": precision,
    }
