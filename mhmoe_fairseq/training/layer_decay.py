"""Learning rates that get smaller towards the input, as in fine-tuning BEiT: ``--layer-decay``.

fairseq has no learning rate of a layer. Here the task notes a factor on every parameter of a new model, and
``--optimizer mhmoe_adam`` makes a parameter group of each factor.
"""

from __future__ import annotations

import logging
import re

from torch import nn

from ..common.errors import UserError
from ..common.ranges import check_flag
from .checks import OPTIMIZER, TrainingFlags, optimizer_name
from .parameter_notes import take_note

logger = logging.getLogger(__name__)

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_EMBEDDING = re.compile(r"(?:^|\.)\w*embed\w*\.")
HEADS = "heads."


def scale_learning_rates(model: nn.Module, flags: TrainingFlags, layer_decay: float, head_multiplier: float) -> None:
    """Note the factor of the learning rate on every parameter of a model that will be trained.

    With n layers the embeddings learn with ``layer_decay ** (n + 1)`` of the learning rate, layer i (from 0) with
    ``layer_decay ** (n - i)``, what comes after the layers with all of it, and the heads with ``head_multiplier``
    times that. Both are 1 where nothing is to change.

    Args:
        model: with its heads under ``heads``.
        flags: the task's configuration.

    Raises:
        UserError: naming the flag, its value and the rule.
    """
    check_flag("layer_decay", layer_decay)
    check_flag("head_lr_multiplier", head_multiplier)
    if layer_decay == 1 and head_multiplier == 1:
        return
    _refuse_unable(flags, "--layer-decay" if layer_decay < 1 else "--head-lr-multiplier")
    parameters = dict(model.named_parameters())
    num_layers = 1 + max((depth for name in parameters if (depth := _layer(name)) is not None), default=-1)
    for name, parameter in parameters.items():
        take_note(parameter, lr_scale=learning_rate_scale(name, num_layers, layer_decay, head_multiplier))
    logger.info(
        f"factors of --lr: {layer_decay ** (num_layers + 1):.3g} in the embeddings, {layer_decay**num_layers:.3g} in "
        f"the first of {num_layers} layers, {head_multiplier:g} in the head"
    )


def learning_rate_scale(name: str, num_layers: int, layer_decay: float, head_multiplier: float) -> float:
    """The factor for the parameter of a name; see ``scale_learning_rates``."""
    if name.startswith(HEADS):
        return head_multiplier
    layer = _layer(name)  # before embeddings: an X-MoE router has expert embeddings
    if layer is not None:
        return layer_decay ** (num_layers - layer)
    return layer_decay ** (num_layers + 1) if _EMBEDDING.search(name) else 1.0


def _layer(name: str) -> int | None:
    found = _LAYER.search(name)
    return int(found.group(1)) if found else None


def _refuse_unable(flags: TrainingFlags, flag: str) -> None:
    """Learning rates by parameter need an optimizer that has parameter groups, and parameters that stay apart."""
    name = optimizer_name(flags)
    if name != OPTIMIZER:
        raise UserError(f"{flag}: --optimizer ({name}) must be {OPTIMIZER}: others have one learning rate for all")
    if flags.fp16 and not (flags.memory_efficient_fp16 or flags.fp16_no_flatten_grads):
        raise UserError(f"{flag}: --fp16 needs --fp16-no-flatten-grads: one flat tensor has one learning rate")
    if flags.zero_sharding != "none":
        raise UserError(f"{flag}: --zero-sharding ({flags.zero_sharding}) must be none: it forms groups of its own")
    if flags.ddp_backend == "fully_sharded":
        raise UserError(f"{flag}: --ddp-backend fully_sharded makes one flat tensor, which has one learning rate")
