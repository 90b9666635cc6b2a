"""The tables of a report, made of records alone."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...common.errors import UserError
from ...common.tables import MISSING, columns_table, markdown_table, millions, number, percent
from ...evaluation.english_tasks import COMPARABLE
from ...evaluation.records import ExpertLoads, Metric
from .routing import mean
from .runs import Model, Run, TrainingLog, all_records, evaluations, mean_and_deviation

# Experts of domains, mixed where the text's domain is not told.
MIXTURES = [f"{kind}{share}" for kind in ("domain mixture", "one-token mixture") for share in ("", " by share")]
# Kind of evaluation -> what a table of models shows of it: the title behind the split's name, and the metric. The first
# is shown of every split, the others of the report's own; of speed and of tasks, whose splits are none, all.
HEADLINES = {
    "perplexity": (("ppl", "perplexity"), ("bits/byte", "bits/byte")),
    **{kind: ((f"ppl by {kind}", "perplexity"), (f"bits/byte by {kind}", "bits/byte")) for kind in MIXTURES},
    "masked": (("ppl", "perplexity"),),
    "classification": (("accuracy", "accuracy"),),
    "questions": (("questions", "accuracy"),),
    "statements": (("statements", "accuracy"),),
    "captions": (("CIDEr", "CIDEr"), ("BLEU-4", "BLEU-4"), ("METEOR", "METEOR"), ("SPICE", "SPICE")),
    "image classification": (("classes", "top-1"),),
    "retrieval": (("recall", "mean recall"),),
    "zero-shot": (("accuracy", "accuracy"), *((mean, mean) for mean in COMPARABLE)),
    "polysemy": (("polysemy", "difference"),),
    "speed": (("output tokens/s", "output tokens/s"), ("prompt tokens/s", "prompt tokens/s")),
}
DIGITS = {
    "bits/character": 4, "bits/byte": 4, "output tokens/s": 1, "input tokens/s": 1, "prompt tokens/s": 1,
    "tokens/s": 0, "difference": 3, "experts per token": 3,
}  # fmt: skip
SHORT = {"perplexity": "ppl", "bits/character": "bits/char", "accuracy": "right"}
LOWER_IS_BETTER = ("perplexity", "loss", "bits/character", "bits/byte")
PART_NAMES = {
    "image": "patches of images", "text": "words of texts", "pair_image": "patches of pairs",
    "pair_text": "words of pairs",
}  # fmt: skip
_ALL_SHOWN = ("speed", "zero-shot")
_COUNTED = {"perplexity": "tokens", **dict.fromkeys(MIXTURES, "tokens"), "masked": "positions", "polysemy": "words"}
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
    "optimizer": ("lr_factors",),
}  # fmt: skip


@dataclass(frozen=True)
class PaperTable:
    """What a paper reports of an experiment.

    Attributes:
        title: such as ``P1 (arXiv 2404.15045), table 5``.
        metric: its name in our records, such as ``perplexity``.
        values: model -> the metric; or column -> the metric for tables with several columns.
        note: what the numbers are of.
        columns: the paper's column -> the column of our table of models that stands beside it; a language, another part
            or a metric of our records needs no entry. A column that the paper has not is ours alone.
    """

    title: str
    metric: str
    values: Mapping[str, float | Mapping[str, float]] = field(default_factory=dict)
    note: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)

    def value(self, model: str, column: str = "") -> float:
        """Returns a model's number, of a table with several columns the one of ``column``; KeyError if it has none."""
        row = self.values[model]
        return row[column] if isinstance(row, Mapping) else row


@dataclass(frozen=True)
class Column:
    """One metric of one kind of evaluation on one split, of the whole split or of a part of it."""

    title: str
    what: str
    split: str
    metric: str
    part: str | None = None

    @property
    def digits(self) -> int:
        """How many stand behind the point."""
        return DIGITS.get(self.metric, 2)

    def measured(self, model: Model) -> dict[str, Metric]:
        """Seed -> the metric, where it was measured."""
        if self in OF_LOGS:
            logged = {run.path.name: OF_LOGS[self](run.log) for run in model.runs}
            return {name: Metric(value, self.metric) for name, value in logged.items() if value is not None}
        found = {}
        for run, record in all_records([model]):
            metrics = record.metrics if self.part is None else record.parts.get(self.part, {})
            if (record.what, record.split) == (self.what, self.split) and self.metric in metrics:
                found[run.path.name] = metrics[self.metric]
        return found

    def values(self, model: Model) -> list[float]:
        """The metric of every seed that has it."""
        return [metric.value for metric in self.measured(model).values()]

    def cell(self, model: Model) -> str:
        """Mean and deviation over the seeds."""
        return spread(self.values(model), self.digits)

    def metrics(self, models: Iterable[Model]) -> list[Metric]:
        """All that was measured of it."""
        return [metric for model in models for metric in self.measured(model).values()]

    def guesses(self, models: Iterable[Model]) -> dict[str, float]:
        """Way of guessing -> what it reaches; the same for all models, so the first that has it says."""
        return {name: value for metric in self.metrics(models)[::-1] for name, value in metric.baselines.items()}


# In training, of the log whatever was evaluated.
TRAINING_SPEED = Column("tokens/s", "training", "train", "tokens/s")
HALFWAY = Column("valid ppl halfway", "training", "valid", "perplexity")
PEAK_MEMORY = Column("peak GB", "training", "train", "peak GB")
CHOICES = Column("top-k in training", "training", "train", "choices")
OF_LOGS = {
    TRAINING_SPEED: TrainingLog.tokens_per_second, HALFWAY: TrainingLog.perplexity_halfway,
    PEAK_MEMORY: TrainingLog.peak_memory, CHOICES: TrainingLog.choices,
}  # fmt: skip


def columns_of(models: Sequence[Model], split: str) -> list[Column]:
    """The metrics that any model has, in the order of ``HEADLINES``."""
    measured = evaluations(models)
    columns = [
        Column(f"{name} {title}", what, name, metric)
        for what, headlines in HEADLINES.items()
        for name in measured.get(what, ())
        for title, metric in headlines
        if metric == headlines[0][1] or name == split or what in _ALL_SHOWN
    ]
    return [column for column in columns if any(map(column.values, models))]


def spread(values: Sequence[float], digits: int = 2, *, sign: str = "", unit: str = "") -> str:
    """``12.34 ± 0.05``; the deviation only with two seeds or more."""
    if not values:
        return MISSING
    middle, deviation = mean_and_deviation(values)
    return f"{middle:{sign},.{digits}f}{unit}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def same(values: Iterable[str]) -> str:
    """The value that all share, or all different ones."""
    return " / ".join(dict.fromkeys(values)) or MISSING


def counts_of(model: Model) -> dict[str, Any]:
    """Parameters and FLOPs as the model's first record has them."""
    return next((record.model["counts"] for _, record in all_records([model]) if record.model), {})


def all_but_experts(model: Model) -> frozenset[tuple[str, str]]:
    """A model's settings without the number of experts, from its first record; what is not set is left out."""
    records = (record.model for _, record in all_records([model]) if record.model)
    settings = next(records, {}).get("settings", {}).get("model") or {}
    kept = {name: str(value) for name, value in settings.items() if value is not None and name != "moe_expert_count"}
    return frozenset(kept.items())


def overview(models: Sequence[Model], columns: Sequence[Column], split: str, reference: str | None) -> str:
    """A row for every model: sizes, costs, its metrics, its use of experts; then one for every way of guessing.

    Raises:
        UserError: if the reference is not among the models.
    """
    against = next((model for model in models if model.name == reference), None)
    if reference is not None and against is None:
        raise UserError(f"--reference ({reference}) must be one of {', '.join(model.name for model in models)}")
    sizes = [counts_of(model) for model in models]
    table = {
        "model": [model.name for model in models],
        "seeds": [str(len({run.path.name for run in model.runs})) for model in models],
        "heads": [str(size.get("heads") or MISSING) for size in sizes],
        "experts x width": [
            f"{size['experts']} x {size['expert_width']:,}" if size.get("experts") else MISSING for size in sizes
        ],
        "top-k": [str(size.get("top_k") or MISSING) for size in sizes],
        CHOICES.title: [CHOICES.cell(model) for model in models],
        "parameters": [millions(size.get("parameters")) for size in sizes],
        "active": [millions(size.get("active")) for size in sizes],
        "MFLOPs/token": [number(size["flops_per_token"] / 1e6) if size else MISSING for size in sizes],
        "tokens/s": [TRAINING_SPEED.cell(model) for model in models],
        PEAK_MEMORY.title: [PEAK_MEMORY.cell(model) for model in models],
        "updates": [_updates(model, ",") for model in models],
        **{column.title: [column.cell(model) for model in models] for column in columns},
        "passes by mixture": [_passes(model) for model in models],
        "active experts": [percent(_mean_of_loads(model, split, ExpertLoads.active)) for model in models],
        "effective experts": [percent(_mean_of_loads(model, split, ExpertLoads.effective)) for model in models],
        "MaxVio": [number(_mean_of_loads(model, split, _max_violation)) for model in models],
    }
    main = next((column for column in columns if column.split == split), None)
    if against is not None and main is not None:
        table[f"{main.title} against {reference}"] = [_change(model, against, main) for model in models]
    if set(table["seeds"]) == {"1"}:
        del table["seeds"]
    # ReMoE's experts are as many as have a positive logit: many more, while its regulariser is small.
    nominal = [(size.get("top_k"), CHOICES.values(model)) for size, model in zip(sizes, models)]
    if all(math.isclose(of, top_k or 0, rel_tol=1e-3) for top_k, measured in nominal for of in measured):
        del table[CHOICES.title]
    for title in (PEAK_MEMORY.title, "passes by mixture"):
        if set(table[title]) == {MISSING}:  # logs from before it was measured; no experts of domains
            del table[title]
    guessed = {column.title: column.guesses(models) for column in columns}
    for guess in dict.fromkeys(name for values in guessed.values() for name in values):
        row = {column.title: number(guessed[column.title].get(guess), column.digits) for column in columns}
        for title, cells in table.items():
            cells.append(f"*{guess}*" if title == "model" else row.get(title, MISSING))
    return columns_table(table)


def _updates(model: Model, form: str = "") -> str:
    return same(format(run.updates, form) for run in model.runs if run.updates)


def _mean_of_loads(model: Model, split: str, statistic: Callable[[ExpertLoads], list[float]]) -> float | None:
    """Mean over MoE layers and seeds."""
    found = [record.expert_loads for run in model.runs if (record := run.expert_record(split)) is not None]
    return mean([value for experts in found for value in statistic(experts.of(None))])


def _max_violation(experts: ExpertLoads) -> list[float]:
    """MaxVio (arXiv 2408.15664): by how much of the mean the largest load exceeds it."""
    return [ratio - 1 for ratio in experts.max_over_mean()]


def _passes(model: Model) -> str:
    """How often a mixture of experts of domains reads the text: once for each of them."""
    mixed = (record for _, record in all_records([model]) if record.what in MIXTURES)
    return same(dict.fromkeys(str(record.settings["passes over the text"]) for record in mixed))


def _change(model: Model, reference: Model, column: Column) -> str:
    """Relative change against the reference's runs with the same seeds."""
    ours, theirs = column.measured(model), column.measured(reference)
    changes = [100 * (ours[seed].value / theirs[seed].value - 1) for seed in ours if seed in theirs]
    return MISSING if model is reference else spread(changes, 1, sign="+", unit=" %")


def against_guessing(models: Sequence[Model], columns: Sequence[Column]) -> str:
    """A line for each score that can be guessed: by how much each model is above the best way of guessing.

    Behind it stand two standard errors of the examples, which no number of seeds makes smaller: the metric's own, mean
    of the seeds; of a share without one the best guess's.
    """
    lines = []
    for column in columns:
        best = max(column.guesses(models).values(), default=None)
        if best is None or column.metric in LOWER_IS_BETTER:
            continue
        told, failed = [], []
        for model in models:
            if measured := list(column.measured(model).values()):
                gain = statistics.fmean(metric.value for metric in measured) - best
                margin = 2 * statistics.fmean(_standard_error(metric, best) for metric in measured)
                told.append(f"{model.name} {gain:+.2f}" + (f" ± {margin:.2f}" if margin else ""))
                failed += [model.name] if round(gain, 2) <= margin else []
        unclear = f"; **not clearly above it: {', '.join(failed)}**" if failed else ""
        lines.append(f"- {column.title} ({best:.2f}): {', '.join(told)}{unclear}")
    head = "Above the best way of guessing without looking, by points, ± two standard errors of the examples:"
    return "\n".join([head, "", *lines]) if lines else ""


def _standard_error(metric: Metric, guess: float) -> float:
    """A metric's own, or of a share of ``count`` examples what ``guess`` percent have; 0 where nothing is known."""
    if metric.stderr is not None:
        return metric.stderr
    return math.sqrt(guess * (100 - guess) / metric.count) if metric.unit == "%" and metric.count else 0.0


def part_columns(models: Sequence[Model], what: str, split: str) -> dict[str, list[Column]]:
    """Metric of languages, modalities or tasks -> a column for each of these, and last for the whole split.

    The loss, which perplexity says too, is left out.
    """
    records = [record for _, record in all_records(models) if (record.what, record.split) == (what, split)]
    parts = [part for record in records for part in record.parts.items()]
    metrics = dict.fromkeys(metric for _, measured in parts for metric in measured if metric != "loss")
    names: dict[str | None, str] = {**{name: PART_NAMES.get(name, name) for name, _ in parts}, None: "all"}
    return {metric: [Column(title, what, split, metric, part) for part, title in names.items()] for metric in metrics}


def parts_section(models: Sequence[Model], what: str, split: str) -> str:
    """A table of languages, modalities or tasks by models; empty where no record has parts."""
    by_metric = part_columns(models, what, split)
    if not by_metric:
        return ""
    if not any(columns[-1].values(model) for columns in by_metric.values() for model in models):
        by_metric = {metric: columns[:-1] for metric, columns in by_metric.items()}  # nothing is of all of them
    first = next(iter(by_metric.values()))
    counts = ([metric.count for metric in column.metrics(models) if metric.count] for column in first)
    table = {
        "": [column.title for column in first],
        _COUNTED.get(what, "examples"): [same(f"{count:,}" for count in of_column) for of_column in counts],
    }
    for metric, columns in by_metric.items():
        for model in models:
            table[f"{model.name}, {SHORT.get(metric, metric)}"] = [column.cell(model) for column in columns]
        for guess in dict.fromkeys(guess for column in columns for guess in column.guesses(models)):
            known = [number(column.guesses(models).get(guess), column.digits) for column in columns]
            table[f"{guess}, {SHORT.get(metric, metric)}"] = known
    return f"## {what.capitalize()} by part, {split} split\n\n{columns_table(table)}"


def differing_settings(models: Sequence[Model]) -> str:
    """A table of the compared settings, and updates done, that are not the same for all models."""
    compared = {"updates done": [_updates(model) for model in models]}
    for section, names in COMPARED_SETTINGS.items():
        for name in names:
            values = [same(_setting(run, section, name) for run in model.runs if run.records) for model in models]
            compared["--" + name.replace("_", "-")] = values
    differing = [[flag, *values] for flag, values in compared.items() if len(set(values)) > 1]
    if not differing:
        return "All models share data order (seed), updates, batch, learning rate, dropout and context."
    table = markdown_table(["setting", *(model.name for model in models)], differing)
    return f"## Settings that differ\n\n{table}"


def precisions(models: Iterable[Model]) -> dict[str, str]:
    """Model -> what it was trained in, as far as records of language models and BEiT-3 tell."""
    found = {}
    for model in models:
        kept = [record.model["settings"].get("model") for _, record in all_records([model]) if record.model]
        if told := [options.get("mhmoe_precision") or "fp32" for options in kept if options]:
            found[model.name] = same(told)
    return found


def devices(models: Iterable[Model]) -> dict[str, str]:
    """Model -> what its records were measured on: ``cpu``, ``cuda``."""
    found = {model.name: [record.provenance.get("device") for _, record in all_records([model])] for model in models}
    return {name: same(of.partition(":")[0] for of in told if of) for name, told in found.items() if any(told)}


def _setting(run: Run, section: str, name: str) -> str:
    value = (run.records[0].model.get("settings", {}).get(section) or {}).get(name)
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def paper_section(paper: PaperTable, models: Sequence[Model], columns: Sequence[Column], split: str) -> str:
    """The paper's own table, a row for each of its models, with ours below where we have the model."""
    numbers = {
        name: values if isinstance(values, Mapping) else {paper.metric: values} for name, values in paper.values.items()
    }
    titles = list(dict.fromkeys([*(title for values in numbers.values() for title in values), *paper.columns]))
    by_name = {model.name: model for model in models}
    rows = []
    for name, values in numbers.items():
        rows.append([f"{name}, paper", *(f"{values[title]:,}" if title in values else MISSING for title in titles)])
        if name in by_name:
            wanted = [paper.columns.get(title, title) for title in titles]
            ours = [_measured(by_name[name], title, paper.metric, columns, split) for title in wanted]
            rows.append([f"{name}, ours", *map(spread, ours)])
    note = ": " + paper.note.rstrip(".") if paper.note else ""
    told = (
        f"{paper.title}{note}. Ours: {split} split. The paper's numbers show an order to look for, not values to reach."
    )
    return f"## What the paper reports, beside ours\n\n{told}\n\n{markdown_table(['', *titles], rows)}"


def _measured(model: Model, title: str, metric: str, columns: Sequence[Column], split: str) -> list[float]:
    """Our values of a column of the paper's: one of the report's columns, a metric or a part of the record."""
    measured = [(what, name) for what, splits in evaluations([model]).items() for name in splits]
    measured.sort(key=lambda names: names[1] != split)
    known = [*columns, *OF_LOGS]
    known = [column for column in known if column.title == title or (column.metric, column.split) == (title, split)]
    for what, name in measured:
        main = HEADLINES.get(what, (("", metric),))[0][1]
        known += [Column(title, what, name, of, title) for of in (metric, main)]
    known += [Column(title, what, name, title.removeprefix(f"{name} ")) for what, name in measured]
    return next((values for column in known if (values := column.values(model))), [])
