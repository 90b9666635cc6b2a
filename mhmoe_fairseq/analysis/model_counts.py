"""Parameters and FLOPs of whole models, from the real model classes without allocating their weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from fairseq.data import Dictionary
from torch import nn

from ..models.language_model import build_language_model
from ..moe import MHMoEConfig


@dataclass(frozen=True)
class ModelCounts:
    """What a language model has and spends.

    Attributes:
        non_expert: parameters outside the routed experts: embedding, attention, dense networks, routers, projections.
        expert: parameters of all routed experts.
        active: parameters that one token uses: all but the experts that its K choices leave out, where the sub-tokens
            of a token are taken to choose the same K.
        flops_per_token: of one token's forward pass, matrix products only (2 per multiply-add), with attention over
            half of ``context`` tokens, the mean of a causal block.
        context: tokens per block that attention was counted for.
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


def count_model(options: Any, dictionary: Dictionary) -> ModelCounts:
    """Build the model of filled options on ``meta`` and count it.

    Raises:
        ValueError: naming the flag, as building the model does.
    """
    return count_built(build_on_meta(options, dictionary), int(options.tokens_per_sample))


def build_on_meta(options: Any, dictionary: Dictionary) -> nn.Module:
    """The model of filled options, without memory for its weights.

    TorchScale's own static layer cannot be built there; ours with the same capacity routing has the same parameters.

    Raises:
        ValueError: naming the flag, as building the model does.
    """
    if str(options.mhmoe_routing) == "torchscale":
        options = copy.copy(options)
        options.mhmoe_routing = "capacity"
    with torch.device("meta"):
        return build_language_model(options, dictionary)


def count_built(model: nn.Module, context: int) -> ModelCounts:
    """Count a model that ``build_language_model`` made."""
    decoder = model.decoder
    layers = [layer for layer in decoder.layers if layer.is_moe_layer]
    moe = decoder.args.moe if layers else None
    total = sum(parameter.numel() for parameter in model.parameters())
    expert = len(layers) * moe.num_experts * moe.num_expert_params() if moe is not None else 0
    idle = len(layers) * (moe.num_experts - moe.top_k) * moe.num_expert_params() if moe is not None else 0
    return ModelCounts(
        non_expert=total - expert,
        expert=expert,
        active=total - idle,
        flops_per_token=_flops_per_token(decoder, context),
        context=context,
        moe_layers=len(layers),
        moe=moe,
    )


def _flops_per_token(decoder: nn.Module, context: int) -> int:
    in_moe_layers = {id(inner) for layer in decoder.layers if layer.is_moe_layer for inner in layer.moe_layer.modules()}
    matrices = sum(
        module.weight.numel()
        for module in decoder.modules()
        if isinstance(module, nn.Linear) and id(module) not in in_moe_layers
    )
    # Queries times keys, weights times values: each D multiply-adds for each of (context + 1) / 2 visible tokens.
    attention = len(decoder.layers) * decoder.embed_dim * (context + 1)
    moe = sum(decoder.args.moe.flops_per_token() for layer in decoder.layers if layer.is_moe_layer)
    return 2 * (matrices + attention) + moe
