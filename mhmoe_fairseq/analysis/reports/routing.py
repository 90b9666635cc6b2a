"""What a record says about routing: the experts of every layer and part, as tables and heat maps."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ...common.tables import MISSING, columns_table, markdown_table, number, percent
from ...evaluation.records import ACTIVE_THRESHOLD, ExpertLoads, Record
from ..routing.loads import PartLoads, accuracy, guess_shares
from .plots import Plot, draw_loads, draw_matrices
from .runs import Model


def describe_routing(record: Record, threshold: float = ACTIVE_THRESHOLD) -> str:
    """Tables for the terminal: of the layers, then of languages or modalities where there are several."""
    loads = record.expert_loads
    whole, metric = loads.of(None), record.metrics.get("loss", record.main)
    experts, counted = len(whole.layers[0].loads), metric.unit.partition("/")[2] or "example"
    head = (
        f"{record.split}: {metric.count or 0:,} {counted}s, {metric.value:.4f} {metric.unit}, {experts} experts; "
        f"active: at least {threshold:.1%} of the uniform load; effective: exp(entropy of the load) / {experts}"
    )
    tables = [head, _layer_table(whole, threshold)]
    if loads.parts:
        tables += [_part_table(record, threshold), _common_table(record), explanation(record)]
    return "\n\n".join(tables)


def _layer_table(whole: ExpertLoads, threshold: float) -> str:
    """A row for every MoE layer and their mean."""
    columns = {"layer": [*(row.name for row in whole.layers), "mean"]}
    for title, values, digits in (
        ("active experts", whole.active(threshold), None),
        ("effective experts", whole.effective(), None),
        ("load max/mean", whole.max_over_mean(), 2),
        ("overflow", [row.overflow for row in whole.layers], None),
        ("router entropy (nats)", [row.entropy for row in whole.layers], 3),
    ):
        shown = [*values, mean(values)]
        columns[title] = [percent(value) if digits is None else number(value, digits) for value in shown]
    return columns_table(columns)


def mean(values: Sequence[float | None]) -> float | None:
    """The mean over layers; None where any is unknown, or there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _part_table(record: Record, threshold: float) -> str:
    """A row for every language or modality."""
    loads = PartLoads.of(record.expert_loads)
    common_GG = loads.overlap_LGG().mean(0)
    experts = [record.expert_loads.of(part) for part in loads.parts]
    metrics = [record.parts.get(part, {}) for part in loads.parts]

    def measured(name: str, digits: int) -> list[str]:
        return [number(of_part[name].value, digits) if name in of_part else MISSING for of_part in metrics]

    columns = {
        "": loads.parts,
        "number": [f"{next(iter(of_part.values())).count:,}" for of_part in metrics],
        "bits": measured("loss", 4),
        **({"bits/byte": per_byte} if set(per_byte := measured("bits/byte", 4)) != {MISSING} else {}),
        "active experts": [percent(mean(rows.active(threshold))) for rows in experts],
        "effective experts": [percent(mean(rows.effective())) for rows in experts],
        "experts per position": measured("experts per position", 2),
        "most in common": [
            f"{loads.parts[other]} {percent(common_G[other])}"
            for other, common_G in zip(_largest_others(common_GG), common_GG)
        ],
    }
    if "guesses" in record.settings:
        share_GG = guess_shares(record.settings["guesses"][-1])
        columns["guessed right"] = [percent(share) for share in share_GG.diagonal()]
        columns["most often taken for"] = [
            loads.parts[other] if other != part and share_GG[part, other] else MISSING
            for part, other in enumerate(_largest_others(share_GG))
        ]
    else:
        columns |= {part: [percent(share) for share in common_G] for part, common_G in zip(loads.parts, common_GG)}
    return columns_table(columns)


def _largest_others(matrix_GG: np.ndarray) -> list[int]:
    """For every row the column, other than its own, with the largest value; its own if there is no other."""
    return np.where(np.eye(len(matrix_GG), dtype=bool), -1, matrix_GG).argmax(1).tolist()


def _common_table(record: Record) -> str:
    """A row for every MoE layer: what the parts share, how well they are told apart, how they spread sub-tokens."""
    loads = PartLoads.of(record.expert_loads)
    shared = loads.mean_overlap()
    columns = {
        "layer": [*(str(layer + 1) for layer in loads.layers), "all"],
        "load in common": [percent(share) for share in [*shared, float(np.mean(shared))]],
    }
    if "guesses" in record.settings:
        columns["part guessed right"] = [percent(accuracy(guesses)) for guesses in record.settings["guesses"]]
    for part, means in record.settings.get("experts_per_position", {}).items():
        columns[f"experts per position of {part}"] = [number(value) for value in [*means, mean(means)]]
    return columns_table(columns)


def routing_section(models: Sequence[Model], split: str) -> str:
    """A row for every model whose first run has expert loads by part: what they share, how well they are told apart."""
    records = {model.name: model.runs[0].expert_record(split) for model in models}
    found = {name: record for name, record in records.items() if record is not None and record.expert_loads.parts}
    if not found:
        return ""
    rows = []
    for name, record in found.items():
        guessed = record.metrics.get("part guessed right")
        shared = percent(mean(PartLoads.of(record.expert_loads).mean_overlap()))
        rows.append([name, shared, MISSING if guessed is None else percent(guessed.value / 100)])
    table = markdown_table(["model", "load in common", "part guessed right"], rows)
    return "\n\n".join(["## Parts in routing", table, *dict.fromkeys(map(explanation, found.values()))])


def explanation(record: Record) -> str:
    """What the numbers of languages or modalities in routing are."""
    told = (
        f"On the {record.split} split, means of the layers. Load in common: the share of their assignments that two "
        "parts give to the same experts, sum of min(p, q), mean of all pairs."
    )
    if "guesses" in record.settings:
        told += (
            " Part guessed right: naive Bayes on the experts that a block's first "
            f"{record.settings['piece_tokens']} tokens went to, learnt on every second block; chance is "
            f"{percent(1 / len(record.expert_loads.parts))}."
        )
    if "most_experts" in record.settings:
        told += (
            " Experts per position: how many different ones the sub-tokens of a position go to, "
            f"{record.settings['most_experts']} at most."
        )
    return told


def activation_plot(name: str, experts: Mapping[str, ExpertLoads], threshold: float = ACTIVE_THRESHOLD) -> Plot:
    """Heat maps of the whole split's loads, MoE layers by experts, one for every model."""
    maps = {}
    for model, loads in experts.items():
        whole = loads.of(None)
        rows = {row.name: row.loads for row in whole.layers}
        maps[f"{model}: {percent(mean(whole.active(threshold)))} active"] = rows
    return name, draw_loads, maps, "Expert activation", "layer"


def part_plots(stem: str, model: str, record: Record) -> Iterator[Plot]:
    """A heat map of parts by experts for every layer, and matrices of what languages share; none without parts."""
    if not record.expert_loads.parts:
        return
    loads = PartLoads.of(record.expert_loads)
    maps = {
        f"layer {layer + 1}": dict(zip(loads.parts, loads.load_GLE[:, index]))
        for index, layer in enumerate(loads.layers)
    }
    yield f"{stem}-load", draw_loads, maps, f"{model}: expert load by part", ""
    if "guesses" in record.settings:
        matrices = {
            "share of load in common (mean of layers)": loads.overlap_LGG().mean(0),
            f"part guessed from {record.settings['piece_tokens']} tokens' routing": guess_shares(
                record.settings["guesses"][-1]
            ),
        }
        yield f"{stem}-overlap", draw_matrices, matrices, f"{model}: parts in routing", loads.parts
