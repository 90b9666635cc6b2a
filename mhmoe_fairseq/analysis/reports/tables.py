"""The tables of a report, made of records alone."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...common.errors import UserError
from ...common.tables import MISSING, markdown_table, millions, number, percent
from ...evaluation.records import ExpertLoads, Metric
from ..routing.loads import PartLoads
from .routing import explanation, mean
from .runs import Model, Run, evaluations, mean_and_deviation

# Kind of evaluation -> what a table of models shows of it: the title behind the split's name, and the metric. The first
# is shown of every split, the others of the report's own.
HEADLINES = {
    "perplexity": (("ppl", "perplexity"), ("bits/byte", "bits/byte")),
    "masked": (("ppl", "perplexity"),),
    "classification": (("accuracy", "accuracy"),),
    "questions": (("questions", "accuracy"),),
    "statements": (("statements", "accuracy"),),
    "captions": (("CIDEr", "CIDEr"), ("BLEU-4", "BLEU-4"), ("METEOR", "METEOR"), ("SPICE", "SPICE")),
    "image classification": (("classes", "top-1"),),
    "retrieval": (("recall", "mean recall"),),
    "zero-shot": (("accuracy", "accuracy"),),
}
DIGITS = {"bits/character": 4, "bits/byte": 4}
SHORT = {"perplexity": "ppl", "bits/character": "bits/char", "accuracy": "right"}
LOWER_IS_BETTER = ("perplexity", "loss", "bits/character", "bits/byte")
PART_NAMES = {
    "image": "patches of images", "text": "words of texts", "pair_image": "patches of pairs",
    "pair_text": "words of pairs",
}  # fmt: skip
_COUNTED = {"perplexity": "tokens", "masked": "positions"}
# Settings that a fair comparison keeps equal, by section of the stored configuration.
COMPARED_SETTINGS = {
    "optimization": ("max_update", "update_freq", "lr", "clip_norm"),
    "dataset": ("batch_size", "max_tokens"),
    "task": (
        "tokens_per_sample", "sample_break_mode", "langs", "multilang_sampling_alpha", "mhmoe_language_token",
        "modalities", "img_size", "patch_size", "max_text_length", "image_mask_prob", "text_mask_prob",
        "pair_text_mask_prob",
    ),
    "common": ("seed",),
    "model": ("dropout", "mhmoe_precision"),
    "criterion": ("moe_gate_loss_wt", "masked_loss_average"),
    "lr_scheduler": ("warmup_updates",),
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """One metric of one kind of evaluation on one split, of the whole split or of a part of it."""

    title: str
    what: str
    split: str
    metric: str
    part: str | None = None

    def measured(self, model: Model) -> dict[str, Metric]:
        """Seed -> the metric, where it was measured."""
        return model.metrics(self.what, self.split, self.metric, self.part)

    def values(self, model: Model) -> list[float]:
        """The metric of every seed that has it."""
        return [metric.value for metric in self.measured(model).values()]

    def cell(self, model: Model) -> str:
        """Mean and deviation over the seeds."""
        return spread(self.values(model), _digits(self))

    def guesses(self, models: Iterable[Model]) -> dict[str, float]:
        """Way of guessing -> what it reaches; the same for all models, so as the first that has it says."""
        found: dict[str, float] = {}
        for metric in self._all(models):
            found = {**metric.baselines, **found}
        return found

    def counts(self, models: Iterable[Model]) -> list[int]:
        """The numbers of examples or tokens that it was measured on."""
        return list(dict.fromkeys(metric.count for metric in self._all(models) if metric.count))

    def margin(self, models: Iterable[Model], share: float) -> float:
        """Two standard errors of a share of right answers in percent; 0 of another metric, or an unknown count."""
        counts = self.counts(models) if all(metric.unit == "%" for metric in self._all(models)) else []
        return 2 * math.sqrt(share * (100 - share) / counts[0]) if counts else 0.0

    def _all(self, models: Iterable[Model]) -> list[Metric]:
        return [metric for model in models for metric in self.measured(model).values()]


def columns_of(models: Sequence[Model], split: str) -> list[Column]:
    """The metrics that any model has, in the order of ``HEADLINES``."""
    measured = evaluations(models)
    columns = [
        Column(f"{name} {title}", what, name, metric)
        for what, headlines in HEADLINES.items()
        for name in measured.get(what, ())
        for title, metric in headlines
        if metric == headlines[0][1] or name == split
    ]
    return [column for column in columns if any(map(column.values, models))]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """``12.34 ± 0.05``; the deviation only with two seeds or more."""
    if not values:
        return MISSING
    middle, deviation = mean_and_deviation(values)
    return f"{middle:,.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def same(values: Iterable[str]) -> str:
    """The value that all share, or all different ones."""
    return " / ".join(dict.fromkeys(values)) or MISSING


def counts_of(model: Model) -> dict[str, Any]:
    """Parameters and FLOPs as the model's first record has them."""
    return next((record.model["counts"] for run in model.runs for record in run.records if record.model), {})


def overview(models: Sequence[Model], columns: Sequence[Column], split: str, reference: str | None) -> str:
    """A row for every model: sizes, costs, its metrics, its use of experts; then one for every way of guessing.

    Raises:
        UserError: if the reference is not among the models.
    """
    against = next((model for model in models if model.name == reference), None)
    if reference is not None and against is None:
        raise UserError(f"--reference ({reference}) must be one of {', '.join(model.name for model in models)}")
    cells: dict[str, Callable[[Model], str]] = {
        "model": lambda model: model.name,
        "seeds": lambda model: str(len({run.seed for run in model.runs})),
        **{title: lambda model, cell=cell: cell(counts_of(model)) for title, cell in _COUNTS.items()},
        "tokens/s": lambda model: spread(_logged(model, lambda log: log.tokens_per_second()), 0),
        "updates": lambda model: same(f"{updates:,}" for updates in _logged(model, lambda log: log.num_updates)),
        **{column.title: column.cell for column in columns},
        "active experts": lambda model: _mean_share(model, split, ExpertLoads.active),
        "effective experts": lambda model: _mean_share(model, split, ExpertLoads.effective),
    }
    main = next((column for column in columns if column.split == split), None)
    if against is not None and main is not None:
        cells[f"{main.title} against {reference}"] = lambda model: _change(model, against, main)
    rows = [[cell(model) for cell in cells.values()] for model in models]
    titles = list(cells)
    kept = [index for index, title in enumerate(titles) if _tells(title, [row[index] for row in rows])]
    guessed = {column.title: column.guesses(models) for column in columns}
    for guess in dict.fromkeys(name for values in guessed.values() for name in values):
        values = {column.title: number(guessed[column.title].get(guess), _digits(column)) for column in columns}
        rows.append([f"*{guess}*", *(values.get(title, MISSING) for title in titles[1:])])
    return markdown_table([titles[index] for index in kept], [[row[index] for index in kept] for row in rows])


_COUNTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "heads": lambda counts: str(counts.get("heads") or MISSING),
    "experts x width": lambda counts: (
        f"{counts['experts']} x {counts['expert_width']:,}" if counts.get("experts") else MISSING
    ),
    "parameters": lambda counts: millions(counts.get("parameters")),
    "active": lambda counts: millions(counts.get("active")),
    "MFLOPs/token": lambda counts: number(counts["flops_per_token"] / 1e6) if counts else MISSING,
}


def _tells(title: str, cells: Sequence[str]) -> bool:
    """Whether a column says anything: not of seeds where every model has one, nor of what no model has."""
    return set(cells) != {"1"} if title == "seeds" else title == "model" or set(cells) != {MISSING}


def _logged(model: Model, ask: Callable[[Any], Any]) -> list[Any]:
    found = (ask(run.log) for run in model.runs if run.log is not None)
    return [value for value in found if value is not None]


def _mean_share(model: Model, split: str, shares: Callable[[ExpertLoads], list[float]]) -> str:
    """Mean over MoE layers and seeds."""
    found = [record.experts for run in model.runs if (record := run.expert_record(split)) is not None]
    return percent(mean([share for experts in found for share in shares(experts.of(None))]))


def _change(model: Model, reference: Model, column: Column) -> str:
    """Relative change against the reference's runs with the same seeds."""
    changes = paired_changes(column.measured(model), column.measured(reference))
    if model is reference or not changes:
        return MISSING
    middle, deviation = mean_and_deviation(changes)
    return f"{100 * middle:+.1f} %" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def paired_changes(ours: Mapping[str, Metric], theirs: Mapping[str, Metric]) -> list[float]:
    """Relative changes of a metric, seed by seed."""
    return [metric.value / theirs[seed].value - 1 for seed, metric in ours.items() if seed in theirs]


def against_guessing(models: Sequence[Model], columns: Sequence[Column]) -> str:
    """A line for each score that can be guessed: by how much each model is above the best way of guessing."""
    lines = []
    for column in columns:
        best = max(column.guesses(models).values(), default=None)
        if best is None or column.metric in LOWER_IS_BETTER:
            continue
        measured = {model.name: values for model in models if (values := column.values(model))}
        gains = {name: round(mean_and_deviation(values)[0] - best, 2) for name, values in measured.items()}
        margin = column.margin(models, best)
        failed = ", ".join(name for name, gain in gains.items() if gain <= margin)
        lines.append(
            f"- {column.title} ({best:.2f}{f', two standard errors {margin:.2f}' if margin else ''}): "
            + ", ".join(f"{name} {gain:+.2f}" for name, gain in gains.items())
            + (f"; **not clearly above it: {failed}**" if failed else "")
        )
    return "\n".join(["Above the best way of guessing without looking, by points:", "", *lines]) if lines else ""


def part_columns(models: Sequence[Model], what: str, split: str) -> dict[str, list[Column]]:
    """Metric of languages, modalities or tasks -> a column for each of these, and last for the whole split.

    The loss, which perplexity says too, is left out.
    """
    parts = [part for model in models for record in model.records(what, split) for part in record.parts.items()]
    metrics = dict.fromkeys(metric for _, measured in parts for metric in measured if metric != "loss")
    names = {**{name: PART_NAMES.get(name, name) for name, _ in parts}, None: "all"}
    return {metric: [Column(title, what, split, metric, part) for part, title in names.items()] for metric in metrics}


def parts_section(models: Sequence[Model], what: str, split: str) -> str:
    """A table of languages, modalities or tasks by models; empty where no record has parts."""
    by_metric = part_columns(models, what, split)
    if not by_metric:
        return ""
    first = next(iter(by_metric.values()))
    header = ["", _COUNTED.get(what, "examples")]
    rows = [[column.title, same(f"{count:,}" for count in column.counts(models))] for column in first]
    for metric, columns in by_metric.items():
        for model in models:
            if any(map(Column.values, columns, [model] * len(columns))):
                header.append(f"{model.name}, {SHORT.get(metric, metric)}")
                rows = [[*row, column.cell(model)] for row, column in zip(rows, columns)]
        for guess in columns[-1].guesses(models):
            header.append(f"{guess}, {SHORT.get(metric, metric)}")
            known = (number(column.guesses(models).get(guess), _digits(column)) for column in columns)
            rows = [[*row, cell] for row, cell in zip(rows, known)]
    return f"## {what.capitalize()} by part, {split} split\n\n{markdown_table(header, rows)}"


def _digits(column: Column) -> int:
    return DIGITS.get(column.metric, 2)


def routing_section(models: Sequence[Model], split: str) -> str:
    """A row for every model whose first run has expert loads by part: what they share, how well they are told apart."""
    found = {model.name: model.runs[0].expert_record(split) for model in models}
    found = {name: record for name, record in found.items() if record is not None and record.experts.parts}
    if not found:
        return ""
    rows = []
    for name, record in found.items():
        guessed = record.metrics.get("language guessed right")
        shared = mean(PartLoads.of(record.experts).mean_overlap())
        rows.append([name, percent(shared), MISSING if guessed is None else percent(guessed.value / 100)])
    table = markdown_table(["model", "load in common", "language guessed right"], rows)
    told = dict.fromkeys(explanation(record) for record in found.values())
    return "\n\n".join(["## Parts in routing", table, *told])


def differing_settings(models: Sequence[Model]) -> str:
    """A table of the compared settings, and updates done, that are not the same for all models."""
    differing: dict[str, list[str]] = {}
    updates = [same(str(updates) for updates in _logged(model, lambda log: log.num_updates)) for model in models]
    if len(set(updates)) > 1:
        differing["updates done"] = updates
    for section, names in COMPARED_SETTINGS.items():
        for name in names:
            values = [same(_setting(run, section, name) for run in model.runs if run.records) for model in models]
            if len(set(values)) > 1:
                differing["--" + name.replace("_", "-")] = values
    if not differing:
        return "All models share data order (seed), updates, batch, learning rate, dropout and context."
    rows = [[flag, *values] for flag, values in differing.items()]
    table = markdown_table(["setting", *(model.name for model in models)], rows)
    return f"## Settings that differ\n\n{table}"


def _setting(run: Run, section: str, name: str) -> str:
    value = (run.records[0].model.get("settings", {}).get(section) or {}).get(name)
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
