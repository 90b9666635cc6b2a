"""The checkpoint that fine-tuning starts from, compared with the new model before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..common.errors import UserError
from ..parallel import sharded_experts

_FINGERPRINT = "vocabulary_fingerprint"
_HEADS = "classification_heads."


def check_pretrained(model: nn.Module, checkpoint: Path, state: Mapping[str, Tensor], data: str) -> None:
    """The checkpoint has the model's dictionary and all of its parameters but new heads, and no other.

    A model that loads checkpoints of other sizes says with ``fitted_state(state)`` what it would load.

    Args:
        model: in training, with its heads.
        checkpoint: its name, for messages.
        state: its ``model``.
        data: the data folder, for messages.

    Raises:
        ValueError: naming the checkpoint and the first thing that differs.
    """
    for name, fingerprint in model.named_buffers():
        owner, found, _ = name.rpartition(_FINGERPRINT)
        if found and name in state and not torch.equal(state[name], fingerprint.cpu()):
            words = f"{state[owner + _embedding(model, owner)].size(0):,} words, "
            raise UserError(
                f"{checkpoint}: its dictionary ({words}other symbols or another order) is not that of {data}: prepare "
                "the data with --data naming the folder that the pre-trained model was trained on"
            )
    difference = next(_differences(model, _fitted(model, checkpoint, state)), None)
    if difference is not None:
        raise UserError(f"{checkpoint}: {difference}: give --arch and the model's flags as in its training")


def _embedding(model: nn.Module, owner: str) -> str:
    """The name of the embedding's weight within the module that keeps the fingerprint."""
    return str(model.get_submodule(owner.rstrip(".")).embedding_name)


def _fitted(model: nn.Module, checkpoint: Path, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if not hasattr(model, "fitted_state"):
        return state
    try:
        return model.fitted_state(state)
    except ValueError as error:
        raise UserError(f"{checkpoint}: {error}") from error


def _differences(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[str]:
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
    for name in sorted(state.keys() - expected.keys() - {name for name, _ in model.named_buffers()}):
        yield f"this model has no parameter {name}"
