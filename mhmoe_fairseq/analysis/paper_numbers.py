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

# P1 table 1, English: validation perplexity at 250k updates, by number of experts.
TABLE_1_ENGLISH = {
    8: {"dense": 16.23, "xmoe": 14.82, "mhmoe": 12.72},
    32: {"dense": 16.23, "xmoe": 11.96, "mhmoe": 10.28},
}
# P1 figure 5: share of active experts with 32 experts.
FIGURE_5_ACTIVE = {"smoe": 0.0833, "mhmoe": 0.9071}
