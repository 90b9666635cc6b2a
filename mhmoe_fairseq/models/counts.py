"""Parameters and FLOPs of whole models, asked of the real model classes, whose weights may be on ``meta``."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from fairseq.data import Dictionary
from torch import nn

from ..common.errors import UserError
from ..moe import MHMoEConfig
from ..torchscale_ext.settings import Multiway
from .beit3 import MHMoEBEiT3, build_beit3
from .language_model import build_language_model
from .options import BEiT3Options


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


def count_built(model: nn.Module, context: int) -> ModelCounts:
    """Count a model that ``build_language_model`` or ``build_beit3`` made, for attention over ``context`` positions."""
    stack = stack_of_layers(model)
    counts = [layer.moe_layer.counts() for layer in stack.layers if layer.is_moe_layer]
    total = sum(parameter.numel() for parameter in model.parameters())
    expert = sum(layer.expert_params for layer in counts)
    moe_flops = sum(layer.flops_per_token for layer in counts)
    bidirectional = isinstance(model, MHMoEBEiT3)
    width = stack.args.encoder_embed_dim if bidirectional else stack.embed_dim
    # Queries times keys, weights times values: each D multiply-adds for each visible token.
    visible = context if bidirectional else (context + 1) / 2
    attention = round(2 * len(stack.layers) * width * visible)
    return ModelCounts(
        non_expert=total - expert,
        expert=expert,
        active=total - sum(layer.params - layer.active_params for layer in counts),
        flops_per_token=2 * (_dense_weights(stack) + attention) + moe_flops,
        context=context,
        moe_layers=len(counts),
        moe=stack.args.moe if counts else None,
    )


def _dense_weights(module: nn.Module) -> int:
    """Weights of the linear maps that one position goes through; of two modalities' maps, one's.

    Experts count themselves.
    """
    if hasattr(module, "counts"):
        return 0
    if isinstance(module, nn.Linear):
        return module.weight.numel()
    return sum(map(_dense_weights, [module.A] if isinstance(module, Multiway) else module.children()))


def stack_of_layers(model: Any) -> Any:
    """The decoder, or BEiT-3's encoder: with ``layers`` and, as ``args``, the settings that it was built from."""
    return model.beit3.encoder if isinstance(model, MHMoEBEiT3) else model.decoder


def build_on_meta(options: Any, dictionary: Dictionary, num_visual_tokens: int = 0) -> nn.Module:
    """The model of filled options, without memory for its weights.

    TorchScale's own static layer cannot be built there; ours with the same capacity routing has the same parameters.

    Args:
        options: of a language model or of BEiT-3.
        num_visual_tokens: BEiT-3's scores for masked patches.

    Raises:
        UserError: naming the flag, as building the model does.
    """
    with torch.device("meta"):
        if isinstance(options, BEiT3Options):
            return build_beit3(options, dictionary, num_visual_tokens)
        if str(options.mhmoe_routing) == "torchscale":
            options = copy.copy(options)
            options.mhmoe_routing = "capacity"
        return build_language_model(options, dictionary)


def blank_dictionary(size: int) -> Dictionary:
    """A dictionary with ``size`` meaningless entries; ``UserError`` if the special symbols alone need more."""
    dictionary = Dictionary()
    if size <= len(dictionary):
        raise UserError(f"--vocab-size ({size}) must be more than the {len(dictionary)} special symbols")
    for number in range(size - len(dictionary)):
        dictionary.add_symbol(f"w{number}")
    return dictionary
