"""P1's table 11, for printing beside our own counts and never mixed with them.

P1: Multi-Head Mixture-of-Experts, arXiv 2404.15045. Its own text does not say how the multimodal rows come about.
"""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .planning import PlanRow, PlanSettings

P1 = "P1 (arXiv 2404.15045)"
# GPT-4's vocabulary, which the text models' rows fit; BEiT-3's; codes of BEiT v2's visual tokenizer.
PAPER_VOCAB_SIZES = {"lm": 100_277, "beit3": 64_010}
PAPER_VISUAL_TOKENS = 8192


class ParameterRow(NamedTuple):
    """One row for one model, in millions."""

    non_expert: int
    expert: int
    total: int


# By kind and family, then by the number of experts.
TABLE_11: dict[tuple[str, str], dict[int | None, tuple[int, int, int]]] = {
    ("lm", "dense"): {None: (162, 0, 162)},
    ("lm", "xmoe"): {
        8: (134, 227, 361), 16: (134, 454, 588), 32: (134, 908, 1042),
        64: (134, 1815, 1949), 128: (134, 3631, 3765), 256: (134, 7263, 7397),
    },
    ("lm", "mhmoe"): {
        8: (141, 213, 354), 16: (141, 430, 571), 32: (141, 898, 1039),
        64: (141, 1797, 1938), 128: (141, 3624, 3765), 256: (141, 7230, 7371),
    },
    ("beit3", "dense"): {None: (277, 0, 277)},
    ("beit3", "xmoe"): {8: (191, 323, 514), 32: (191, 1037, 1228)},
    ("beit3", "mhmoe"): {8: (195, 310, 505), 32: (195, 1014, 1209)},
}  # fmt: skip
# Flags that say what the table's models are, beside their architecture.
_SAME = {
    "mhmoe_heads_number": 4, "moe_top_k": 2, "mhmoe_budget": "params", "img_size": 224, "patch_size": 16,
    "decoder_ffn_embed_dim": 3072, "encoder_ffn_embed_dim": 3072,
}  # fmt: skip


def paper_row(row: "PlanRow", settings: "PlanSettings") -> ParameterRow | None:
    """The paper's numbers for the same settings; None for other settings."""
    architecture = settings.architecture
    sizes = architecture.size, settings.vocab_size, settings.num_visual_tokens
    if sizes != ("base", PAPER_VOCAB_SIZES[architecture.kind], PAPER_VISUAL_TOKENS):
        return None
    found = TABLE_11.get((architecture.kind, row.family), {}).get(row.experts)
    return ParameterRow(*found) if found and settings.flags.items() <= _SAME.items() else None
