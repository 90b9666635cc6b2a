"""What the papers report, for printing beside our own figures and never mixed with them.

P1: Multi-Head Mixture-of-Experts, arXiv 2404.15045.
"""

from __future__ import annotations

P1 = "P1 (arXiv 2404.15045)"

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
