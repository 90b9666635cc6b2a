"""The checkpoint that fine-tuning starts from, compared with the new model before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..parallel import sharded_experts

_FINGERPRINT = "decoder.vocabulary_fingerprint"
_HEADS = "classification_heads."


def check_pretrained(model: nn.Module, checkpoint: Path, state: dict[str, Tensor], data: str) -> None:
    """The checkpoint has the model's dictionary and all of its parameters but new heads, and no other.

    Args:
        model: in training, with its heads.
        checkpoint: its name, for messages.
        state: its ``model``.
        data: the data folder, for messages.

    Raises:
        ValueError: naming the checkpoint and the first thing that differs.
    """
    fingerprint = state.get(_FINGERPRINT)
    if fingerprint is not None and not torch.equal(fingerprint, model.get_buffer(_FINGERPRINT).cpu()):
        words = f"{state['decoder.embed_tokens.weight'].size(0):,} words, "
        raise UserError(
            f"{checkpoint}: its dictionary ({words}other symbols or another order) is not that of {data}: prepare the "
            "data with --data naming the folder that the language model was trained on"
        )
    difference = next(_differences(model, state), None)
    if difference is not None:
        raise UserError(f"{checkpoint}: {difference}: give --arch and the model's flags as in its training")


def _differences(model: nn.Module, state: dict[str, Tensor]) -> Iterator[str]:
    # A rank holds a part of the experts, checkpoints hold all: their shapes differ in the first dimension.
    sharded = {id(shard.parameter) for shard in sharded_experts(model)}
    expected = dict(model.named_parameters(remove_duplicate=False))  # tied weights are saved under both names
    for name, parameter in expected.items():
        first = 1 if id(parameter) in sharded else 0
        if name not in state:
            if not name.startswith(_HEADS):
                yield f"it has no parameter {name}"
        elif state[name].shape[first:] != parameter.shape[first:]:
            yield f"its {name} is of shape {tuple(state[name].shape)}, this model's of {tuple(parameter.shape)}"
    for name in sorted(state.keys() - expected.keys() - {_FINGERPRINT}):
        yield f"this model has no parameter {name}"
