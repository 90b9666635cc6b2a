"""What records say about polysemous words and their control: tables and plots (P1's figure 7)."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from ...common.tables import MISSING, columns_table, number
from ...evaluation.records import Metric, Record
from .plots import Plot, draw_curves, draw_distributions

_GROUPS = ("polysemous", "control")
_LABEL = "experts per token, mean of the layers"


def describe_polysemy(courses: Mapping[str, Sequence[Record]]) -> str:
    """Tables for the terminal: a row for every checkpoint, then the words that they were measured on.

    Args:
        courses: the records of every training, in the order of updates.
    """
    records = [record for course in courses.values() for record in course]
    last = records[-1]
    head = (
        f"{last.split}: different experts of a token's sub-tokens, mean of the MoE layers; difference: polysemous less "
        f"control, mean of {last.main.count} pairs of words of equally many tokens and like frequency, with the 95 % "
        f"interval of a bootstrap over pairs\nwords: {last.settings['rule']}"
    )
    tables = [head, _course_table(courses), f"the last row's words:\n\n{_word_table(last)}"]
    if any(record.settings["most_experts"] == record.model["counts"]["top_k"] for record in records):
        tables.append("at most top-k experts: tokens are not split, each goes to as many experts: nothing can differ")
    return "\n\n".join(tables)


def course_of(records: Sequence[Record]) -> Record:
    """The last checkpoint's record, which also tells what was measured of all: ``course`` among its settings."""
    course = [
        {
            "updates": record.checkpoint["updates"],
            **{group: _experts(record, group).value for group in _GROUPS},
            "difference": record.main.value,
            "interval": record.settings["interval"],
        }
        for record in records
    ]
    return dataclasses.replace(records[-1], settings={**records[-1].settings, "course": course})


def _course_table(courses: Mapping[str, Sequence[Record]]) -> str:
    records = [record for course in courses.values() for record in course]
    columns = {"training": [name for name, course in courses.items() for _ in course]} if len(courses) > 1 else {}
    columns["updates"] = [f"{record.checkpoint['updates'] or 0:,}" for record in records]
    columns["at most"] = [str(record.settings["most_experts"]) for record in records]
    columns |= {group: [number(_experts(record, group).value, 3) for record in records] for group in _GROUPS}
    columns["difference"] = [f"{record.main.value:+.3f}" for record in records]
    columns["95 % interval"] = ["{:+.3f} to {:+.3f}".format(*record.settings["interval"]) for record in records]
    for layer in records[-1].settings["difference_by_layer"]:
        of_layer = [record.settings["difference_by_layer"].get(layer) for record in records]
        columns[f"layer {layer}"] = [MISSING if value is None else f"{value:+.3f}" for value in of_layer]
    return columns_table(columns)


def _word_table(record: Record) -> str:
    """A row for each group: the paired words, and all that the split has."""
    of_groups = [record.settings[group] for group in _GROUPS]
    everything = [_experts(record, f"all {group}") for group in _GROUPS]
    return columns_table(
        {
            "words": list(_GROUPS),
            "paired": [str(_experts(record, group).count) for group in _GROUPS],
            "occurrences": [f"{of_group['occurrences']:,}" for of_group in of_groups],
            "geometric mean": [number(of_group["typical_occurrences"], 2) for of_group in of_groups],
            "tokens per word": [number(of_group["tokens_per_word"], 2) for of_group in of_groups],
            "found": [str(metric.count) for metric in everything],
            "experts per token of all found": [number(metric.value, 3) for metric in everything],
        }
    )


def _experts(record: Record, group: str) -> Metric:
    return record.parts[group]["experts per token"]


def polysemy_plots(stem: str, model: str, records: Sequence[Record]) -> Iterator[Plot]:
    """Distributions of both groups of the last checkpoint, and the course over updates where there are several."""
    last = records[-1]
    pairs = last.settings["pairs"]
    values = {f"{group} words": [pair[2 * side + 1] for pair in pairs] for side, group in enumerate(_GROUPS)}
    title = f"{model}: different experts of a token's sub-tokens"
    yield stem, draw_distributions, values, title, f"{_LABEL}, at most {last.settings['most_experts']}"
    if len(records) > 1:
        curves = {
            f"{group} words": [(record.checkpoint["updates"] or 0, _experts(record, group).value) for record in records]
            for group in _GROUPS
        }
        yield f"{stem}-course", draw_curves, curves, title, _LABEL
