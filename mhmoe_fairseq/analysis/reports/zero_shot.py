"""What ``mhmoe zero-shot`` says of models side by side."""

from collections.abc import Mapping, Sequence

from ...common.tables import markdown_table, number
from ...data.zero_shot_tasks import TASKS
from ...evaluation.english_tasks import LENGTH, answers_of, mean_over
from ...evaluation.records import Record
from .tables import PaperTable

PROBE = "cross-lingual probe of our own, not XNLI: which of n sentences translates the one before it"


def describe_english(records: dict[str, Record], tasks: Sequence[str]) -> str:
    """A row for each score of the tasks, majority and chance beside those of the models, then the mean and of what."""
    answers = {name: [answers_of(record)[task] for task in tasks] for name, record in records.items()}
    columns = [
        {**{part: metric for each in of for part, metric in each.scores.items()}, "mean": mean_over(of)}
        for of in answers.values()
    ]
    table = []
    for part, metric in columns[0].items():
        guesses = [number(metric.baselines.get(guess), 1) for guess in ("majority", "chance")]
        scores = [f"{column[part].value:.1f} ± {column[part].stderr or 0:.1f}" for column in columns]
        table.append([part, f"{metric.count:,}", *scores, *guesses])
    first, settings = next(iter(answers.values())), next(iter(records.values())).settings
    titles = dict.fromkeys(TASKS[task].title for task in tasks)
    missing = dict.fromkeys(task.title for task in TASKS.values() if task.title not in titles)
    absent = f" Absent: {', '.join(missing)}." if missing else ""
    trial = "" if settings["limit"] is None else f" A trial: --limit {settings['limit']}."
    return "\n".join([
        f"Zero-shot accuracy (%) and its standard error, by lm-eval's prompts and metrics.{trial}",
        f"Last row: mean of {len(columns[0]) - 1} scores of {len(titles)} task{'s' if len(titles) > 1 else ''}, which "
        f"compares with a mean of the same ones alone.{absent}",
        f"{sum(of.cut['cut'] for of in first):,} of {sum(of.cut['scored'] for of in first):,} texts were longer than "
        f"{settings[LENGTH]} tokens and lost their beginning.",
        "",
        markdown_table(["score", "questions", *records, "majority", "chance"], table),
    ])  # fmt: skip


def describe_xnli(records: dict[str, Record], split: str, limit: int | None, paper: PaperTable) -> str:
    """Ours and the paper's, in percent."""
    first = next(iter(records.values()))
    codes = list(first.parts)
    rows: dict[str, Mapping[str, float]] = {}
    for name, record in records.items():
        mean = record.metrics.get("mean of the paper's languages")
        rows[f"ours: {name}"] = record.values("accuracy") | ({} if mean is None else {"avg": mean.value})
    rows |= {f"paper: {name}": row for name, row in paper.values.items() if isinstance(row, Mapping)}
    table = [[name, *(number(values.get(code), 1) for code in [*codes, "avg"])] for name, values in rows.items()]
    counts = {metrics["accuracy"].count or 0 for metrics in first.parts.values()}
    size = " to ".join(map(str, sorted({min(counts), max(counts)})))
    trial = "" if limit is None else f"; a trial: --limit {limit}"
    return "\n".join([
        f"Zero-shot XNLI accuracy (%), {split}, {size} examples per language{trial}; chance 33.3; "
        "avg: mean of the paper's 14 languages.",
        f"The paper's rows ({paper.title}) are other models on other training data: beside ours, not mixed with them.",
        "",
        markdown_table(["model", *codes, "avg"], table),
    ])  # fmt: skip


def describe_probe(records: dict[str, Record], candidates: int, split: str) -> str:
    """A row for every pair and their mean, two columns for every model."""
    first = next(iter(records.values()))
    header = ["pair", "items", *(f"{name}: {way}" for name in records for way in first.metrics)]
    rows = []
    for pair in [*first.parts, None]:
        found = [record.metrics if pair is None else record.parts[pair] for record in records.values()]
        cells = [f"{metric.value:.1f} ± {metric.stderr:.1f}" for metrics in found for metric in metrics.values()]
        rows.append([pair or "mean", str(next(iter(found[0].values())).count), *cells])
    return "\n".join([
        f"{PROBE[0].upper()}{PROBE[1:]} (n = {candidates}, {split} split).",
        f"Accuracy in percent and its standard error; chance is {100 / candidates:.1f}. Pair: language of the "
        "context - of the candidates.",
        "",
        markdown_table(header, rows),
    ])  # fmt: skip
