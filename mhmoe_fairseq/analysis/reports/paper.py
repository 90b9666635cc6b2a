"""A table of a paper, printed beside our own metrics and never mixed with them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...common.tables import MISSING, markdown_table
from .runs import Model, evaluations
from .tables import Column, spread


@dataclass(frozen=True)
class PaperTable:
    """What a paper reports of an experiment.

    Attributes:
        title: such as ``P1 (arXiv 2404.15045), table 5``.
        metric: its name in our records, such as ``perplexity``.
        values: model -> the metric; or column -> the metric for tables with several columns.
        note: what the numbers are of.
        columns: the paper's column -> the column of our table of models that stands beside it; a language, another part
            or a metric of our records needs no entry.
    """

    title: str
    metric: str
    values: Mapping[str, float | Mapping[str, float]] = field(default_factory=dict)
    note: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)


def paper_section(paper: PaperTable | None, models: Sequence[Model], columns: Sequence[Column], split: str) -> str:
    """The paper's own table, a row for each of its models, with ours below where we have the model."""
    if paper is None:
        return ""
    numbers = {
        name: values if isinstance(values, Mapping) else {paper.metric: values} for name, values in paper.values.items()
    }
    titles = list(dict.fromkeys(title for values in numbers.values() for title in values))
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
    known = [column for column in columns if column.title == title or (column.metric, column.split) == (title, split)]
    known += [Column(title, what, name, metric, title) for what, name in measured]
    return next((values for column in known if (values := column.values(model))), [])
