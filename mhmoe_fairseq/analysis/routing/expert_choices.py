"""Which experts every position of a model of images and text goes to, recorded while the model works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...moe import MHMoELayer
from ...moe.gate import Assignment
from ...torchscale_ext.multiway_experts import SeparateExperts

IMAGE, TEXT, PAIR = "image", "text", "pair"


@dataclass(frozen=True)
class RoutedCall:
    """One call of the model.

    Attributes:
        modality: ``image``, ``text`` or ``pair``.
        image_positions: how many of the L positions are the image's, the class token first.
        is_real: bool ``(B, L)``, False where padded.
        choices: by MoE layer, ``(B, L, H, K)`` experts of each sub-token, before any is dropped for lack of capacity;
            where each modality has experts of its own, the text's follow the image's.
    """

    modality: str
    image_positions: int
    is_real: Tensor
    choices: dict[int, Tensor]


@dataclass
class _Recorder:
    pools: dict[int, list[MHMoELayer]]
    waiting: dict[int, list[Tensor]] = field(default_factory=dict)
    calls: list[RoutedCall] = field(default_factory=list)

    def note_gate(self, layer: int, pool: MHMoELayer, assignment: Assignment) -> None:
        choices = assignment.choices_NK.view(-1, pool.config.split_heads, pool.config.top_k)
        self.waiting.setdefault(layer, []).append(choices)

    def note_call(self, extra: dict[str, Any]) -> None:
        padding_mask, split = extra["padding_mask"], extra["image_positions"]
        first = next(iter(self.waiting.values()))
        positions = sum(len(part) for part in first)
        if padding_mask is None:
            is_real = first[0].new_ones(positions // split, split, dtype=torch.bool)
            modality = IMAGE
        else:
            is_real, modality = ~padding_mask, PAIR if split else TEXT
        choices = {layer: self._joined(layer, parts, is_real, split) for layer, parts in self.waiting.items()}
        self.waiting = {}
        self.calls.append(RoutedCall(modality, split, is_real, choices))

    def _joined(self, layer: int, parts: list[Tensor], is_real: Tensor, split: int) -> Tensor:
        """``(B, L, H, K)`` of a layer's one pool, or of its pools for images and for text."""
        batch, length = is_real.shape
        if len(parts) == 1:
            return parts[0].view(batch, length, *parts[0].shape[1:])
        image, text = (part.view(batch, size, *part.shape[1:]) for part, size in zip(parts, (split, length - split)))
        return torch.cat([image, text + self.pools[layer][0].config.num_experts], dim=1)


def expert_layers(model: nn.Module) -> list[int]:
    """Places of the MoE layers in a model of images and text, from 0."""
    return [place for place, layer in enumerate(model.beit3.encoder.layers) if layer.is_moe_layer]


def num_experts(model: nn.Module) -> int:
    """Experts of a layer of images and text; of both modalities together where each has its own."""
    layer = model.beit3.encoder.layers[expert_layers(model)[0]].moe_layer
    return layer.config.num_experts * (2 if isinstance(layer, SeparateExperts) else 1)


@contextmanager
def recorded_choices(model: nn.Module) -> Iterator[list[RoutedCall]]:
    """A list that every call of the model in evaluation mode is appended to.

    Args:
        model: ``MHMoEBEiT3`` with MoE layers.
    """
    pools = {}
    for place in expert_layers(model):
        layer = model.beit3.encoder.layers[place].moe_layer
        pools[place] = [layer.A, layer.B] if isinstance(layer, SeparateExperts) else [layer]
    recorder = _Recorder(pools)
    handles = [model.register_forward_hook(lambda module, given, output: recorder.note_call(output[1]))]
    for place, members in pools.items():
        for pool in members:
            handles.append(
                pool.gate.register_forward_hook(
                    lambda module, given, chosen, place=place, pool=pool: recorder.note_gate(place, pool, chosen)
                )
            )
    try:
        yield recorder.calls
    finally:
        for handle in handles:
            handle.remove()


def distinct_experts(choices: Tensor, experts: int) -> Tensor:
    """``(..., H, K) -> (...)``: to how many different experts the sub-tokens of each position go."""
    used = torch.zeros(*choices.shape[:-2], experts, dtype=torch.bool, device=choices.device)
    return used.scatter(-1, choices.flatten(-2), True).sum(-1)
