"""What a model's routers did on some batches, in sums."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq import utils
from torch import Tensor

from ...moe import RoutingStats


@dataclass
class RoutingCounts:
    """Sums over batches.

    Attributes:
        bits: cross entropy.
        tokens: targets.
        layers: routing counts by the MoE layer's index in the decoder, in float64: float32 stops counting at 16
            million.
    """

    bits: float = 0.0
    tokens: int = 0
    layers: dict[int, RoutingStats] = field(default_factory=dict)

    def add(self, other: RoutingCounts) -> None:
        """Add the counts of other batches."""
        self.bits += other.bits
        self.tokens += other.tokens
        for layer, new in other.layers.items():
            old = self.layers.get(layer)
            self.layers[layer] = new if old is None else RoutingStats(*(a + b for a, b in zip(old, new)))

    @property
    def load_LE(self) -> Tensor:
        """``(layers, E)`` float64, assignments before dropping."""
        return torch.stack([self.layers[layer].expert_load for layer in sorted(self.layers)])


@torch.no_grad()
def count_routing(model: torch.nn.Module, batches: Iterable[dict[str, Any]]) -> RoutingCounts:
    """Evaluate some batches of fairseq's."""
    total = RoutingCounts()
    device = next(model.parameters()).device
    for sample in batches:
        sample = utils.move_to_cuda(sample) if device.type == "cuda" else sample
        logits, extra = model(**sample["net_input"])
        stats = {
            layer: RoutingStats(*(count.double().cpu() for count in counts))
            for layer, counts in enumerate(extra["moe_stats"])
            if counts is not None
        }
        total.add(RoutingCounts(_bits(model, logits, sample["target"]), int(sample["ntokens"]), stats))
    return total


def _bits(model: torch.nn.Module, logits: Tensor, target: Tensor) -> float:
    padding = model.decoder.dictionary.pad()
    nats = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), target.flatten(), ignore_index=padding, reduction="sum"
    )
    return nats.item() / math.log(2)
