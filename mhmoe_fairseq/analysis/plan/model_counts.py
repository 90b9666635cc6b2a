"""Parameters and FLOPs of whole models, from the real model classes without allocating their weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from fairseq.data import Dictionary
from torch import nn

from ...checkpoints.parts import by_part
from ...models.beit3 import MHMoEBEiT3, build_beit3
from ...models.language_model import build_language_model
from ...models.options import BEiT3Options
from ...moe import MHMoEConfig


@dataclass(frozen=True)
class ModelCounts:
    """What a model has and spends.

    Attributes:
        non_expert: parameters outside the routed experts: embedding, attention, dense networks, routers, projections.
        expert: parameters of all routed experts.
        active: parameters that one token uses: all but the experts that its K choices leave out, where the sub-tokens
            of a token are taken to choose the same K.
        flops_per_token: of one token's forward pass, matrix products only (2 per multiply-add), with attention over
            half of ``context`` tokens, the mean of a causal block; of BEiT-3 of one position's pass through the
            encoder, attending to all ``context`` positions, without the heads and the embedding of patches.
        context: tokens per block, or positions, that attention was counted for.
        moe_layers: number of MoE layers.
        moe: their configuration; None for a dense model.
    """

    non_expert: int
    expert: int
    active: int
    flops_per_token: int
    context: int
    moe_layers: int
    moe: MHMoEConfig | None

    @property
    def total(self) -> int:
        """All parameters, the tied embedding once."""
        return self.non_expert + self.expert


def blank_dictionary(size: int) -> Dictionary:
    """A dictionary with ``size`` entries, for models that are only counted.

    Raises:
        ValueError: if the special symbols alone need more.
    """
    dictionary = Dictionary()
    if size <= len(dictionary):
        raise ValueError(f"--vocab-size ({size}) must be more than the {len(dictionary)} special symbols")
    for number in range(size - len(dictionary)):
        dictionary.add_symbol(f"w{number}")
    return dictionary


def count_model(options: Any, dictionary: Dictionary, num_visual_tokens: int = 0) -> ModelCounts:
    """Build the model of filled options on ``meta`` and count it; see ``build_on_meta``.

    Raises:
        ValueError: naming the flag, as building the model does.
    """
    return count_built(build_on_meta(options, dictionary, num_visual_tokens), context_of(options))


def context_of(options: Any) -> int:
    """Positions that attention is counted for; of BEiT-3 an image's with the longest text."""
    if isinstance(options, BEiT3Options):
        return 1 + (int(options.img_size) // int(options.patch_size)) ** 2 + int(options.max_text_length)
    return int(options.tokens_per_sample)


def build_on_meta(options: Any, dictionary: Dictionary, num_visual_tokens: int = 0) -> nn.Module:
    """The model of filled options, without memory for its weights.

    TorchScale's own static layer cannot be built there; ours with the same capacity routing has the same parameters.

    Args:
        options: of a language model or of BEiT-3.
        dictionary: of the text.
        num_visual_tokens: BEiT-3's scores for masked patches.

    Raises:
        ValueError: naming the flag, as building the model does.
    """
    with torch.device("meta"):
        if isinstance(options, BEiT3Options):
            return build_beit3(options, dictionary, num_visual_tokens)
        if str(options.mhmoe_routing) == "torchscale":
            options = copy.copy(options)
            options.mhmoe_routing = "capacity"
        return build_language_model(options, dictionary)


def count_built(model: nn.Module, context: int) -> ModelCounts:
    """Count a model that ``build_language_model`` or ``build_beit3`` made."""
    stack = stack_of_layers(model)
    layers = [layer for layer in stack.layers if layer.is_moe_layer]
    moe = stack.args.moe if layers else None
    total = sum(parameter.numel() for parameter in model.parameters())
    expert, used = 0, 0
    if moe is not None:
        pools = 2 if getattr(stack.args, "separate_experts", False) else 1
        expert = len(layers) * pools * moe.num_experts * moe.num_expert_params()
        used = len(layers) * moe.top_k * moe.num_expert_params()
    return ModelCounts(
        non_expert=total - expert,
        expert=expert,
        active=total - expert + used,
        flops_per_token=_flops_per_token(model, context),
        context=context,
        moe_layers=len(layers),
        moe=moe,
    )


def stack_of_layers(model: Any) -> Any:
    """The decoder, or BEiT-3's encoder: with ``layers`` and, as ``args``, the settings that it was built from."""
    return model.beit3.encoder if isinstance(model, MHMoEBEiT3) else model.decoder


def _flops_per_token(model: nn.Module, context: int) -> int:
    stack = stack_of_layers(model)
    bidirectional = isinstance(model, MHMoEBEiT3)
    width = stack.args.encoder_embed_dim if bidirectional else stack.embed_dim
    moe_layers = [layer for layer in stack.layers if layer.is_moe_layer]
    in_moe_layers = {id(inner) for layer in moe_layers for inner in layer.moe_layer.modules()}
    matrices = sum(
        module.weight.numel()
        for name, module in stack.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in in_moe_layers and ".B" not in name
    )
    # Queries times keys, weights times values: each D multiply-adds for each visible token.
    visible = context if bidirectional else (context + 1) / 2
    attention = round(2 * len(stack.layers) * width * visible)
    moe = sum(stack.args.moe.flops_per_token() for _ in moe_layers)
    return 2 * (matrices + attention) + moe


def count_parts(model: nn.Module) -> dict[str, int]:
    """Parameters by part of the model; they add up to all."""
    return by_part((name, parameter.numel()) for name, parameter in model.named_parameters())
