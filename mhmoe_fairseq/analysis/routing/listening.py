"""Listen to the gates of a model of images and text: which experts every position goes to, while the model works."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...common.errors import UserError
from ...moe import MHMoELayer
from ...moe.gate import Assignment
from ...torchscale_ext.feed_forward import SeparateExperts

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


@contextmanager
def listening(model: nn.Module, hear: Callable[[RoutedCall], None]) -> Iterator[None]:
    """Tell ``hear`` of every call of the model inside this context.

    Args:
        model: ``MHMoEBEiT3`` with MoE layers, in evaluation mode.
        hear: is given each call when the model returns.

    Raises:
        UserError: a layer's experts cannot be listened to.
    """
    layers = {index: pools_of(model, index) for index in expert_layers(model)}
    heard: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def note(index: int, heads: int, assignment: Assignment) -> None:
        choices = assignment.choices_NK.view(-1, heads, assignment.choices_NK.size(-1))
        heard.setdefault(index, []).append((choices, _is_real(assignment).view(-1, heads)[:, 0]))

    def end_call(module: nn.Module, given: Any, output: tuple[Tensor, dict[str, Any]]) -> None:
        padding_mask, split = output[1]["padding_mask"], output[1]["image_positions"]
        modality, length = (IMAGE, split) if padding_mask is None else (PAIR if split else TEXT, padding_mask.size(1))
        joined = {index: _joined(parts, split, length, layers[index]) for index, parts in heard.items()}
        heard.clear()
        is_real = next(iter(joined.values()))[1]
        hear(RoutedCall(modality, split, is_real, {index: choices for index, (choices, _) in joined.items()}))

    handles = [model.register_forward_hook(end_call)]
    for index, pools in layers.items():
        for pool in pools:
            hook = functools.partial(_call_with_output, functools.partial(note, index, pool.config.subtokens_per_token))
            handles.append(pool.gate.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _call_with_output(hear: Callable[[Any], None], module: nn.Module, given: Any, output: Any) -> None:
    """A forward hook that passes the output on and leaves it as it is."""
    hear(output)


def _is_real(assignment: Assignment) -> Tensor:
    """Bool ``(N,)``: the sub-tokens that are not padding, in evaluation."""
    if assignment.kept_NK is None:
        return torch.ones_like(assignment.choices_NK[:, 0], dtype=torch.bool)
    real_NK = assignment.kept_NK if assignment.dropped_NK is None else assignment.kept_NK | assignment.dropped_NK
    return real_NK[:, 0]


def _joined(
    parts: list[tuple[Tensor, Tensor]], split: int, length: int, pools: list[MHMoELayer]
) -> tuple[Tensor, Tensor]:
    """Choices ``(B, L, H, K)`` of a layer's pool, or of its pools for images and text, and what is real ``(B, L)``."""
    batch = sum(len(is_real) for _, is_real in parts) // length
    sizes = [length] if len(parts) == 1 else [split, length - split]
    choices = [chosen.view(batch, size, *chosen.shape[1:]) for (chosen, _), size in zip(parts, sizes)]
    is_real = [real.view(batch, size) for (_, real), size in zip(parts, sizes)]
    if len(parts) > 1:
        choices[1] = choices[1] + pools[0].config.num_experts
    return torch.cat(choices, dim=1), torch.cat(is_real, dim=1)


def expert_layers(model: nn.Module) -> list[int]:
    """Indices of the MoE layers in a model of images and text, from 0."""
    return [index for index, layer in enumerate(model.beit3.encoder.layers) if layer.is_moe_layer]


def pools_of(model: nn.Module, index: int) -> list[MHMoELayer]:
    """The experts of a layer: one pool, or one for images and one for text.

    Raises:
        UserError: the layer does not tell which experts it chose.
    """
    layer = model.beit3.encoder.layers[index].moe_layer
    pools = [layer.A, layer.B] if isinstance(layer, SeparateExperts) else [layer]
    if not all(isinstance(pool, MHMoELayer) for pool in pools):
        raise UserError(f"layer {index + 1} ({type(layer).__name__}) does not tell which experts its positions choose")
    return pools


def num_experts(model: nn.Module, index: int) -> int:
    """How many experts a layer has, those of both modalities together where each has its own."""
    return sum(pool.config.num_experts for pool in pools_of(model, index))


def most_distinct(model: nn.Module) -> int:
    """To how many different experts the sub-tokens of one position can go."""
    config = pools_of(model, expert_layers(model)[0])[0].config
    return min(config.num_experts, config.subtokens_per_token * config.top_k)


def distinct_experts(choices: Tensor, experts: int) -> Tensor:
    """To how many different experts the sub-tokens of each position go, ``(..., H, K) -> (...)``."""
    used = torch.zeros(*choices.shape[:-2], experts, dtype=torch.bool, device=choices.device)
    return used.scatter(-1, choices.flatten(-2), True).sum(-1)
