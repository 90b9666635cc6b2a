"""Parameters by the part of the model that they belong to, told from their names."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

# The first pattern found in a name decides; a norm inside a part counts there.
_PARTS = {
    "task heads": r"^(heads|classification_heads)\.",
    "experts": r"\.experts\.",
    "shared experts": r"\.shared_expert\.",
    "routers": r"\.router\.",
    "head and merge projections": r"\.(head|merge)_projection\.",
    "attention": r"\.self_attn\.",
    "dense networks": r"\.ffn\.",
    "text embedding": r"\.(text_embed|embed_tokens)\.",
    "patch embedding": r"\.vision_embed\.",
    "positions": r"\.embed_positions\.",
    "text head": r"^text_head\.|\.output_projection\.",
    "image head": r"^image_head\.",
    "norms": r"norm",
}


def by_part(sizes: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Sums of the sizes of named parameters by part; ``other`` is what no pattern fits."""
    sums: dict[str, int] = {}
    for name, size in sizes:
        part = next((part for part, pattern in _PARTS.items() if re.search(pattern, name)), "other")
        sums[part] = sums.get(part, 0) + size
    return {part: sums[part] for part in (*_PARTS, "other") if part in sums}


def count_parts(model: nn.Module) -> dict[str, int]:
    """Parameters of a model by part; they add up to all."""
    return by_part((name, parameter.numel()) for name, parameter in model.named_parameters())
