"""What a paper claims of two models, and the rule by which our runs are said to show it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from ...common.tables import MISSING
from ...evaluation.records import ExpertLoads, Record
from .routing import mean
from .runs import Model, Run, mean_and_deviation
from .tables import HEADLINES, LOWER_IS_BETTER, spread

CONFIDENCE = 0.95
MIN_SEEDS = 3
# 0.975 quantiles of Student's t with 1, 2, ... degrees of freedom; a larger sample takes the last, which is wider.
T_QUANTILES = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448,
    2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
)  # fmt: skip
SEEN, REFUTED, NOT_SEEN, NOT_RUN = "seen", "refuted at this scale", "not seen", "not run"
RULE = (
    "A claim is judged by one rule. Seed by seed (the same seed is the same order of data) the model's test metric is "
    "compared with the reference's: the relative change, or points of a share in percent. If the paired 95 % t "
    "interval of these differences lies wholly on the side of the claim, it is **seen**; wholly on the other, "
    f"**refuted at this scale**; else **not seen**, which says that the interval does not exclude 0 and not that the "
    f"models are equal. Fewer than {MIN_SEEDS} seeds claim nothing. With three seeds an interval's own width is "
    "uncertain (of differences that deviate by 0.9 %, a true one of 1.8 % is seen every other time), and of twenty "
    "comparisons of equal models one is expected to fall outside its interval."
)
# Metrics of no evaluation: from a run's training log or its expert loads, with the unit.
_OTHER: dict[str, tuple[str, Callable[[Run, str], float | None]]] = {
    "tokens/s": ("tokens/s", lambda run, split: run.log.tokens_per_second()),
    "balance loss": ("", lambda run, split: next((value for _, value in run.log.curve("gate_loss")[::-1]), None)),
    "active experts": ("%", lambda run, split: _share(run, split, ExpertLoads.active)),
    "effective experts": ("%", lambda run, split: _share(run, split, ExpertLoads.effective)),
}
_LOWER_IS_BETTER = (*LOWER_IS_BETTER, "balance loss")


@dataclass(frozen=True)
class Claim:
    """``model`` is better than ``reference``: a lower loss or perplexity, a higher score.

    Attributes:
        text: the claim in words, such as ``MH-MoE has a lower perplexity than X-MoE``.
        model, reference: names of models of the experiment.
        paper: what the paper measured, in its own numbers.
        metric: its name in our records, such as ``perplexity``; without ``what`` also ``active experts``,
            ``effective experts``, and of the training's log ``tokens/s``, ``balance loss``; empty: the main one of
            ``what``.
        what: kind of the evaluation, such as ``perplexity``, ``masked``, ``captions``; empty: the first of the records.
        reference_what: of the reference, where it is another.
        part: language, domain or modality; None: the whole split.
        reference_part: of the reference, where it is another.
    """

    text: str
    model: str
    reference: str
    paper: str = ""
    metric: str = ""
    what: str = ""
    split: str = "test"
    part: str | None = None
    reference_part: str | None = None
    reference_what: str | None = None

    def of_reference(self) -> "Claim":
        """What is measured of the reference: of it the same is asked as of a model."""
        part = self.part if self.reference_part is None else self.reference_part
        return replace(self, part=part, what=self.what if self.reference_what is None else self.reference_what)


@dataclass(frozen=True)
class Finding:
    """What our runs say of a claim.

    Attributes:
        verdict: by the rule of :data:`RULE`.
        changes: seed -> the model's metric against the reference's, in ``unit``: percent of it, or points.
        values: the metric of model and reference, mean and deviation.
        scale: tokens trained, width, updates.
    """

    verdict: str
    changes: dict[str, float] = field(default_factory=dict)
    unit: str = "%"
    values: tuple[str, str] = (MISSING, MISSING)
    scale: str = MISSING

    @property
    def change(self) -> str:
        """Mean change with its deviation."""
        return spread(list(self.changes.values()), 2, sign="+", unit=f" {self.unit}")

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The interval that the verdict is about; None with less than two seeds."""
        return interval(list(self.changes.values()))

    @property
    def interval(self) -> str:
        """The same in words."""
        return MISSING if self.bounds is None else "[{:+.2f}, {:+.2f}]".format(*self.bounds)

    @property
    def told(self) -> str:
        """Mean change, its interval and the number of seeds: ``-2.02 % [-3.54, -0.50], n = 3``."""
        mean_change = f"{sum(self.changes.values()) / len(self.changes):+.2f} {self.unit}" if self.changes else MISSING
        of = "" if self.bounds is None else f" {self.interval}"
        return f"{mean_change}{of}, n = {len(self.changes)}"


def interval(differences: list[float]) -> tuple[float, float] | None:
    """The paired t interval of :data:`CONFIDENCE` around their mean; None with less than two."""
    middle, deviation = mean_and_deviation(differences) if differences else (0.0, None)
    if deviation is None:
        return None
    half = T_QUANTILES[min(len(differences) - 1, len(T_QUANTILES)) - 1] * deviation / math.sqrt(len(differences))
    return middle - half, middle + half


def verdict_of(changes: list[float], lower_is_better: bool) -> str:
    """Returns the verdict on changes of the claimed model against its reference."""
    if not changes:
        return NOT_RUN
    bounds = interval(changes)
    if bounds is None or len(changes) < MIN_SEEDS:
        return f"{'one seed' if len(changes) == 1 else f'{len(changes)} seeds'}: nothing claimed"
    low, high = (-bounds[1], -bounds[0]) if lower_is_better else bounds
    return SEEN if low > 0 else REFUTED if high < 0 else NOT_SEEN


def judge(claim: Claim, models: Mapping[str, Model]) -> Finding:
    """Returns what the runs say of a claim; those of a pair that differ in length, data or width are not compared."""
    model, reference = models.get(claim.model), models.get(claim.reference)
    if model is None or reference is None:
        return Finding(NOT_RUN)
    ours, theirs = _measured(claim, model), _measured(claim.of_reference(), reference)
    changes, unit = {}, "%"
    for seed, (value, of, terms) in ours.items():
        other, _, other_terms = theirs.get(seed, (0.0, "", None))
        if terms != other_terms or (of != "%" and other == 0):
            continue
        changes[seed] = value - other if of == "%" else 100 * (value / other - 1)
        unit = "points" if of == "%" else "%"
    if not changes:
        return Finding(NOT_RUN)
    shown = tuple(spread([found[seed][0] for seed in changes]) for found in (ours, theirs))
    verdict = verdict_of(list(changes.values()), _metric(claim, model) in _LOWER_IS_BETTER)
    return Finding(verdict, changes, unit, (shown[0], shown[1]), scale_of([model]))


def _metric(claim: Claim, model: Model) -> str:
    """The name of the claim's metric."""
    if claim.metric:
        return claim.metric
    first = next((record.what for run in model.runs for record in run.records), "perplexity")
    headlines = HEADLINES.get(claim.what or first)
    return headlines[0][1] if headlines else ""


def _measured(claim: Claim, model: Model) -> dict[str, tuple[float, str, tuple[object, ...]]]:
    """Seed -> value and unit of the claim's metric, and what has to be the same of two runs for a comparison."""
    metric, part = _metric(claim, model), claim.part
    found: dict[str, tuple[float, str, tuple[object, ...]]] = {}
    for run in model.runs:
        record = next((record for record in (*run.records, *run.routing) if _fits(claim, record, metric)), None)
        any_record = record or next(iter(run.records), None)
        terms = (run.updates, any_record and any_record.data.get("digest"), any_record and width_of(any_record))
        if record is not None:
            of = record.metrics if part is None else record.parts[part]
            found[run.path.name] = of[metric].value, of[metric].unit, terms
        elif metric in _OTHER and not claim.what:
            unit, measure = _OTHER[metric]
            if (value := measure(run, claim.split)) is not None:
                found[run.path.name] = value, unit, terms
    return found


def _fits(claim: Claim, record: Record, metric: str) -> bool:
    split = record.split if record.what == claim.what == "zero-shot" else claim.split  # whose splits are tasks
    if record.split != split or (claim.what and record.what != claim.what):
        return False
    return metric in (record.metrics if claim.part is None else record.parts.get(claim.part, {}))


def _share(run: Run, split: str, shares: Callable[[ExpertLoads], list[float]]) -> float | None:
    """Percent of the experts, mean of the MoE layers."""
    record = run.expert_record(split)
    found = None if record is None or record.experts is None else mean([*shares(record.experts.of(None))])
    return None if found is None else 100 * found


def width_of(record: Record) -> int | None:
    """The width of a model, as its settings have it."""
    settings = record.model.get("settings", {}).get("model") or {}
    return settings.get("decoder_embed_dim") or settings.get("encoder_embed_dim")


def scale_of(models: list[Model]) -> str:
    """``4.1M tokens, width 128, 1,000 updates``: what the runs of these models were trained at, as far as known."""
    runs = [run for model in models for run in model.runs]
    widths = dict.fromkeys(str(width) for run in runs for record in run.records[:1] if (width := width_of(record)))
    tokens = dict.fromkeys(f"{of / 1e6:.1f}M" for run in runs if (of := run.tokens()) is not None)
    updates = dict.fromkeys(f"{run.updates:,}" for run in runs if run.updates)
    told = (("", tokens, " tokens"), ("width ", widths, ""), ("", updates, " updates"))
    return ", ".join(f"{before}{' / '.join(values)}{after}" for before, values, after in told if values) or MISSING
