"""What records say about polysemous words and their control: tables and plots (P1's figure 7)."""

import dataclasses
from collections.abc import Iterator, Sequence

from ...common.tables import columns_table, number
from ...evaluation.records import Metric, Record
from .plots import Plot, draw_curves, draw_distributions

_GROUPS = ("polysemous", "control")
_LABEL = "experts per token, mean of the layers"


def describe_polysemy(records: Sequence[Record]) -> str:
    """Tables for the terminal: a row for every checkpoint, then the words that the last one was measured on."""
    last = records[-1]
    most = last.settings["most_experts"]
    head = (
        f"{last.split}: different experts of a token's sub-tokens, at most {most}, mean of the MoE layers; difference: "
        f"polysemous less control, mean of {last.main.count} pairs of words of equally many tokens and like frequency, "
        "with the 95 % interval of a bootstrap over pairs\n"
        f"words: {last.settings['rule']}"
    )
    if most == last.model["counts"]["top_k"]:  # one sub-token
        head += f"\na token of this model always goes to {most} experts: nothing can differ"
    return "\n\n".join([head, _course_table(records), _word_table(last)])


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


def _course_table(records: Sequence[Record]) -> str:
    columns = {"updates": [f"{record.checkpoint['updates'] or 0:,}" for record in records]}
    columns |= {group: [number(_experts(record, group).value, 3) for record in records] for group in _GROUPS}
    columns["difference"] = [f"{record.main.value:+.3f}" for record in records]
    columns["95 % interval"] = ["{:+.3f} to {:+.3f}".format(*record.settings["interval"]) for record in records]
    for layer in records[-1].settings["difference_by_layer"]:
        columns[f"layer {layer}"] = [f"{record.settings['difference_by_layer'][layer]:+.3f}" for record in records]
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
