"""P1's table 11, for printing beside our own counts and never mixed with them.

P1: Multi-Head Mixture-of-Experts, arXiv 2404.15045. Its own text does not say how the multimodal rows come about.
"""

P1 = "P1 (arXiv 2404.15045)"
# By kind: GPT-4's vocabulary, which the text models' rows fit, or BEiT-3's; codes of BEiT v2's visual tokenizer.
PAPER_VISUAL_TOKENS = 8192
PAPER_VOCAB_SIZES = {"lm": 100_277, "beit3": 64_010}
# Non-expert, expert and all parameters in millions; by kind and family, then by the number of experts.
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
SAME_MODEL = {
    "mhmoe_heads_number": 4, "moe_top_k": 2, "mhmoe_budget": "params", "img_size": 224, "patch_size": 16,
    "decoder_ffn_embed_dim": 3072, "encoder_ffn_embed_dim": 3072,
}  # fmt: skip
