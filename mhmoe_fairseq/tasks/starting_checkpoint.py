"""The checkpoint that fairseq will start a training from, looked at before the training is set up."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.files import read_trained
from ..common.errors import UserError
from ..parallel import sharded_experts

RESUMED = "checkpoint_last.pt"  # fairseq's default: a run of the same task, in --save-dir
_FINGERPRINT = "vocabulary_fingerprint"
_HEADS = "classification_heads."


def check_starting_checkpoint(model: nn.Module, args: Any) -> None:
    """Compare the files of ``--finetune-from-model`` and ``--restore-file``, if there are any, with the model.

    They must have its dictionary and all of its parameters but new heads, and no other. A model that loads checkpoints
    of other sizes says with ``fitted_state(state)`` what it would load.

    Args:
        model: in training, with its heads.
        args: the task's flags.

    Raises:
        UserError: naming the checkpoint and the first thing that differs.
    """
    for name in (args.finetune_from_model, args.restore_file):
        if name and name != RESUMED and Path(name).is_file():
            for difference in _differences(model, read_trained(Path(name))["model"], args.data):
                raise UserError(f"{name}: {difference}")


def check_resumed_sizes(model: nn.Module, args: Any) -> None:
    """A run that fairseq resumes with its optimizer has the model's position tables: no weights can be resized then.

    fairseq would load the resized tables beside moments of the old shape, and the first update would fail.

    Args:
        model: an ``MHMoEBEiT3``, in training.
        args: the task's flags.

    Raises:
        UserError: naming the flag, the file and what to do.
    """
    file = resumed_checkpoint(args)
    saved = {} if file is None or args.reset_optimizer else read_trained(file)
    if not saved.get("last_optimizer_state"):
        return
    for flag, unit, before, now in model.resized_tables(saved["model"]):
        new_run = f", or begin a new run with --finetune-from-model {file} and another --save-dir"
        if flag == "--max-text-length" and now > before:
            new_run = ""  # which would be refused, too
        raise UserError(
            f"{flag} ({getattr(args, flag[2:].replace('-', '_'))}): the model has positions for {now} {unit}, {file} "
            f"has them for {before}, and its optimizer's state cannot be resumed with another number: give {flag} as "
            f"in its training{new_run}"
        )


def resumed_checkpoint(args: Any) -> Path | None:
    """The file of ``--restore-file``, in ``--save-dir`` unless it is given as a path; None if there is none."""
    path = Path(args.save_dir, RESUMED) if args.restore_file == RESUMED else Path(args.restore_file)
    return path if path.is_file() else None


def _differences(model: nn.Module, state: Mapping[str, Tensor], data: str) -> Iterator[str]:
    """What is to be mended before a checkpoint's ``state`` can be loaded, the most telling first."""
    buffers = dict(model.named_buffers())
    for name, fingerprint in buffers.items():
        owner, found, _ = name.rpartition(_FINGERPRINT)
        if found and name in state and not torch.equal(state[name], fingerprint.cpu()):
            embedding = state[owner + model.get_submodule(owner.rstrip(".")).embedding_name]
            yield (
                f"its dictionary ({embedding.size(0):,} words, other symbols or another order) is not that of {data}: "
                "prepare the data with --data naming the folder that the pre-trained model was trained on"
            )
    try:
        state = model.fitted_state(state) if hasattr(model, "fitted_state") else state
    except ValueError as error:
        yield str(error)
    # A rank holds a part of the experts, checkpoints hold all: their shapes differ in the first dimension.
    sharded = {id(shard.parameter) for shard in sharded_experts(model)}
    expected = dict(model.named_parameters(remove_duplicate=False))  # tied weights are saved under both names
    remedy = "give --arch and the model's flags as in its training"
    for name, parameter in expected.items():
        first = 1 if id(parameter) in sharded else 0
        if name not in state:
            if not name.startswith(_HEADS):
                yield f"it has no parameter {name}: {remedy}"
        elif state[name].shape[first:] != parameter.shape[first:]:
            shapes = f"of shape {tuple(state[name].shape)}, this model's of {tuple(parameter.shape)}"
            yield f"its {name} is {shapes}: {remedy}"
    for name in sorted(state.keys() - expected.keys() - buffers.keys()):
        yield f"this model has no parameter {name}: {remedy}"
