"""How images and texts are routed, as tables for the terminal."""

from __future__ import annotations

from ...common.tables import markdown_table, number, percent
from ...moe.stats import active_share, effective_share
from ..routing.modality_routing import ModalityRouting


def describe_modalities(routing: ModalityRouting, threshold: float) -> str:
    """A row for every group of positions, then one for every MoE layer.

    Args:
        threshold: an expert is active from this share of the uniform load on.
    """
    shared_LGG = routing.overlap_LGG()
    mean_GG = shared_LGG.mean(0)
    by_group = [
        [
            group,
            f"{routing.positions[place]:,}",
            percent(float(active_share(routing.load_GLE[place], threshold).mean())),
            percent(float(effective_share(routing.load_GLE[place]).mean())),
            number(sum(routing.distinct[place]) / len(routing.layers)),
            *(percent(float(share)) for share in mean_GG[place]),
        ]
        for place, group in enumerate(routing.groups)
    ]
    header = ["positions of", "number", "active experts", "effective experts", "experts per position"]
    header += [f"in common with {group}" for group in routing.groups]
    by_layer = [
        [str(layer + 1), *(number(distinct[place]) for distinct in routing.distinct)]
        for place, layer in enumerate(routing.layers)
    ]
    explanation = (
        f"On the {routing.split} split, means of the layers. Experts per position: how many different ones the "
        f"sub-tokens of a position go to, {routing.most_distinct} at most. In common: the share of their assignments "
        "that two groups give to the same experts, sum of min(p, q)."
    )
    return "\n\n".join([
        markdown_table(header, by_group),
        explanation,
        markdown_table(["layer", *(f"experts per position of {group}" for group in routing.groups)], by_layer),
    ])  # fmt: skip
