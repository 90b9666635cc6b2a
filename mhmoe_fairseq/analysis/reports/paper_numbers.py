"""What the papers report, for printing beside our own figures and never mixed with them.

P1: Multi-Head Mixture-of-Experts, arXiv 2404.15045.
"""

from __future__ import annotations

from typing import NamedTuple

P1 = "P1 (arXiv 2404.15045)"


class ParameterRow(NamedTuple):
    """One row of P1's table 11 for one model, in millions."""

    non_expert: int
    expert: int
    total: int


# P1 table 11, English and multilingual language modelling.
TABLE_11_DENSE = 162
TABLE_11 = {
    "xmoe": {
        8: ParameterRow(134, 227, 361),
        16: ParameterRow(134, 454, 588),
        32: ParameterRow(134, 908, 1042),
        64: ParameterRow(134, 1815, 1949),
        128: ParameterRow(134, 3631, 3765),
        256: ParameterRow(134, 7263, 7397),
    },
    "mhmoe": {
        8: ParameterRow(141, 213, 354),
        16: ParameterRow(141, 430, 571),
        32: ParameterRow(141, 898, 1039),
        64: ParameterRow(141, 1797, 1938),
        128: ParameterRow(141, 3624, 3765),
        256: ParameterRow(141, 7230, 7371),
    },
}

# P1 table 11, masked multimodal modelling; its own text does not say how the rows come about.
TABLE_11_MULTIMODAL_DENSE = 277
TABLE_11_MULTIMODAL = {
    "xmoe": {8: ParameterRow(191, 323, 514), 32: ParameterRow(191, 1037, 1228)},
    "mhmoe": {8: ParameterRow(195, 310, 505), 32: ParameterRow(195, 1014, 1209)},
}

# P1 table 1, English: validation perplexity at 250k updates, by number of experts.
TABLE_1_ENGLISH = {
    8: {"dense": 16.23, "xmoe": 14.82, "mhmoe": 12.72},
    32: {"dense": 16.23, "xmoe": 11.96, "mhmoe": 10.28},
}
# P1 table 1, multilingual, the same.
TABLE_1_MULTILINGUAL = {
    8: {"dense": 8.56, "xmoe": 7.19, "mhmoe": 6.26},
    32: {"dense": 8.56, "xmoe": 6.02, "mhmoe": 5.09},
}
# P1 table 1, masked multimodal modelling, the same.
TABLE_1_MULTIMODAL = {
    8: {"dense": 17.95, "xmoe": 16.34, "mhmoe": 14.73},
    32: {"dense": 17.95, "xmoe": 12.68, "mhmoe": 10.87},
}
# P1 table 3, XNLI zero-shot: accuracy in percent and its average, by model and number of experts.
_TABLE_3_COLUMNS = ("bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh", "avg")
_TABLE_3_ROWS = {
    "dense": (33.1, 33.3, 33.0, 35.1, 32.8, 34.4, 33.6, 34.2, 33.3, 33.1, 33.3, 33.9, 33.5, 32.9, 33.5),
    "X-MoE 8": (33.9, 33.4, 33.4, 37.3, 33.3, 35.9, 34.5, 35.0, 33.5, 33.6, 33.4, 34.2, 33.3, 33.2, 34.1),
    "MH-MoE 8": (34.4, 33.2, 33.9, 40.1, 34.0, 36.4, 34.6, 35.2, 33.8, 34.4, 33.3, 34.7, 34.6, 33.5, 34.7),
    "X-MoE 32": (34.5, 34.5, 33.4, 39.6, 33.1, 35.3, 34.1, 35.4, 33.6, 34.7, 33.7, 33.6, 34.5, 33.3, 34.5),
    "MH-MoE 32": (35.8, 35.6, 34.1, 40.7, 33.9, 36.7, 34.4, 36.3, 34.3, 36.0, 34.1, 34.3, 35.2, 33.6, 35.3),
}
TABLE_3 = {model: dict(zip(_TABLE_3_COLUMNS, row)) for model, row in _TABLE_3_ROWS.items()}
# P1 figure 5: share of active experts with 32 experts.
FIGURE_5_ACTIVE = {"smoe": 0.0833, "mhmoe": 0.9071}
# P1 table 4, 8 experts: percent, and scores times 100.
TABLE_4_COLUMNS = (
    "VQAv2 test-dev", "VQAv2 test-std", "NLVR2 dev", "NLVR2 test-P", "COCO BLEU-4", "METEOR", "CIDEr", "SPICE"
)  # fmt: skip
TABLE_4 = {
    "dense": (65.9, 66.0, 73.8, 74.2, 35.9, 29.3, 120.5, 19.6),
    "X-MoE": (68.4, 69.7, 75.5, 76.1, 38.1, 30.2, 122.9, 21.3),
    "MH-MoE": (70.1, 71.4, 77.0, 77.8, 39.7, 33.1, 124.1, 23.0),
}
