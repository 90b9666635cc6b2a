"""A table of a paper, printed beside our own metrics and never mixed with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


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
