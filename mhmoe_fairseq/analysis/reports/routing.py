"""What a record says about routing: the experts of every layer and part, as tables and heat maps."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from ...common.tables import MISSING, markdown_table, number, percent
from ...evaluation.records import ACTIVE_THRESHOLD, ExpertLoads, Record
from ..routing.loads import PartLoads, accuracy
from .plots import draw_loads, draw_matrices, relative_load


def describe_routing(record: Record, threshold: float = ACTIVE_THRESHOLD) -> str:
    """Tables for the terminal: of the layers, then of languages or modalities where there are several.

    Args:
        record: with expert loads.
        threshold: an expert is active from this share of the uniform load on.
    """
    whole, metric = record.experts.of(None), record.metrics.get("loss", record.main)
    experts, counted = len(whole.layers[0].loads), metric.unit.partition("/")[2] or "example"
    head = (
        f"{record.split}: {metric.count or 0:,} {counted}s, {metric.value:.4f} {metric.unit}, {experts} experts; "
        f"active: at least {threshold:.1%} of the uniform load; effective: exp(entropy of the load) / {experts}"
    )
    tables = [head, _layer_table(whole, threshold)]
    if record.experts.parts:
        tables += [_part_table(record, threshold), _common_table(record), explanation(record)]
    return "\n\n".join(tables)


def _layer_table(whole: ExpertLoads, threshold: float) -> str:
    """A row for every MoE layer and their mean."""
    columns = {
        "active experts": (whole.active(threshold), percent),
        "effective experts": (whole.effective(), percent),
        "load max/mean": (whole.max_over_mean(), number),
        "overflow": ([row.overflow for row in whole.layers], percent),
        "router entropy (nats)": ([row.entropy for row in whole.layers], lambda value: number(value, 3)),
    }
    rows = [[row.name] for row in whole.layers] + [["mean"]]
    for values, show in columns.values():
        for row, value in zip(rows, [*values, mean(values)]):
            row.append(show(value))
    return markdown_table(["layer", *columns], rows)


def mean(values: list[float | None]) -> float | None:
    """The mean over layers; None where any is unknown, or there is none."""
    return sum(values) / len(values) if values and None not in values else None


def _part_table(record: Record, threshold: float) -> str:
    """A row for every language or modality."""
    loads = PartLoads.of(record.experts)
    common_GG = loads.overlap_LGG().mean(0)
    guesses = np.array(record.settings["guesses"][-1]) if "guesses" in record.settings else None
    header = ["", "number", "bits", "active experts", "effective experts", "experts per position", "most in common"]
    header += ["guessed right", "most often taken for"] if guesses is not None else list(loads.parts)
    rows = []
    for index, part in enumerate(loads.parts):
        measured = record.parts.get(part, {})
        others = [other for other in range(len(loads.parts)) if other != index]
        nearest = max(others, key=lambda other: common_GG[index, other], default=index)
        experts, first = record.experts.of(part), next(iter(measured.values()))
        row = [part, f"{first.count:,}"]
        row += [number(measured[name].value, digits) if name in measured else MISSING
                for name, digits in (("loss", 4), ("experts per position", 2))]  # fmt: skip
        row[3:3] = [percent(mean(experts.active(threshold))), percent(mean(experts.effective()))]
        row.append(f"{loads.parts[nearest]} {percent(common_GG[index, nearest])}")
        if guesses is None:
            row += [percent(share) for share in common_GG[index]]
        else:
            wrong = max(others, key=lambda other: guesses[index, other], default=index)
            row.append(percent(guesses[index, index] / max(guesses[index].sum(), 1)))
            row.append(loads.parts[wrong] if others and guesses[index, wrong] else MISSING)
        rows.append(row)
    kept = [column for column in range(len(header)) if any(row[column] != MISSING for row in rows)]
    return markdown_table([header[column] for column in kept], [[row[column] for column in kept] for row in rows])


def _common_table(record: Record) -> str:
    """A row for every MoE layer: what the parts share, how well they are told apart, how they spread sub-tokens."""
    loads = PartLoads.of(record.experts)
    columns = {"load in common": [percent(share) for share in [*loads.mean_overlap(), np.mean(loads.mean_overlap())]]}
    if "guesses" in record.settings:
        guesses = map(np.array, record.settings["guesses"])
        columns["language guessed right"] = [percent(accuracy(guesses_GG)) for guesses_GG in guesses]
    for part, means in record.settings.get("experts_per_position", {}).items():
        columns[f"experts per position of {part}"] = [number(value) for value in [*means, mean(means)]]
    rows = zip([*(str(layer + 1) for layer in loads.layers), "all"], *columns.values())
    return markdown_table(["layer", *columns], [list(row) for row in rows])


def explanation(record: Record) -> str:
    """What the numbers of languages or modalities in routing are."""
    told = (
        f"On the {record.split} split, means of the layers. Load in common: the share of their assignments that two "
        "parts give to the same experts, sum of min(p, q), mean of all pairs."
    )
    if "guesses" in record.settings:
        told += (
            " Language guessed right: naive Bayes on the experts that a block's first "
            f"{record.settings['piece_tokens']} tokens went to, learnt on every second block; chance is "
            f"{percent(1 / len(record.experts.parts))}."
        )
    if "most_experts" in record.settings:
        told += (
            " Experts per position: how many different ones the sub-tokens of a position go to, "
            f"{record.settings['most_experts']} at most."
        )
    return told


def draw_activation(path: Path, experts: Mapping[str, ExpertLoads], threshold: float = ACTIVE_THRESHOLD) -> None:
    """Draw heat maps of the whole split's loads, MoE layers by experts, one for every model."""
    maps = {}
    for name, loads in experts.items():
        rows = loads.of(None).layers
        active = percent(mean(loads.of(None).active(threshold)))
        maps[f"{name}: {active} active"] = ([row.name for row in rows], relative_load([row.loads for row in rows]))
    draw_loads(path, maps, "layer")


def draw_parts(folder: Path, stem: str, name: str, record: Record) -> Iterator[tuple[str, Path]]:
    """Draw a heat map of parts by experts for every layer, and matrices of what languages share; titles and files.

    Args:
        stem: what the names of the files begin with.
        name: of the model.
        record: with expert loads by part; there is no plot without.
    """
    if record.experts is None or not record.experts.parts:
        return
    loads = PartLoads.of(record.experts)
    maps = {
        f"layer {layer + 1}": (loads.parts, relative_load(loads.load_GLE[:, index]))
        for index, layer in enumerate(loads.layers)
    }
    title, path = f"{name}: expert load by part", folder / f"{stem}-load.png"
    draw_loads(path, maps, "", title)
    yield title, path
    if "guesses" in record.settings:
        guesses_GG = np.array(record.settings["guesses"][-1])
        matrices = {
            "share of load in common (mean of layers)": loads.overlap_LGG().mean(0),
            f"language guessed from {record.settings['piece_tokens']} tokens' routing": (
                guesses_GG / np.maximum(guesses_GG.sum(1, keepdims=True), 1)
            ),
        }
        title, path = f"{name}: languages in routing", folder / f"{stem}-overlap.png"
        draw_matrices(path, matrices, loads.parts, title)
        yield title, path
