"""The mean of several checkpoints' weights, chosen as fairseq's ``average_checkpoints.py`` does."""

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.errors import UserError
from ..common.ranges import flag
from ..models.options import options_with
from .files import OPTIMIZER_STATE, SUFFIXES, read_checkpoint
from .summary import fingerprint_of, weights_of

_EPOCH = re.compile(r"checkpoint(\d+)\.pt")
_UPDATE = re.compile(r"checkpoint_\d+_(\d+)\.pt")


def choose_inputs(inputs: list[Path], epochs: int | None, updates: int | None, upper_bound: int | None) -> list[Path]:
    """The files to average.

    Args:
        inputs: files, or one folder.
        epochs: the newest so many ``checkpointN.pt`` of the folder.
        updates: the newest so many ``checkpoint_EPOCH_N.pt`` of the folder.
        upper_bound: leave out those with a higher N.

    Raises:
        UserError: naming the flag and what is missing.
    """
    flag, count = ("--num-epoch-checkpoints", epochs) if updates is None else ("--num-update-checkpoints", updates)
    if epochs is not None and updates is not None:
        raise UserError("--num-epoch-checkpoints and --num-update-checkpoints exclude each other: give one")
    if count is None:
        if upper_bound is not None:
            raise UserError("--checkpoint-upper-bound needs --num-epoch-checkpoints or --num-update-checkpoints")
        return _files(inputs)
    if count < 1:
        raise UserError(f"{flag} ({count}) must be at least 1")
    if len(inputs) != 1 or not inputs[0].is_dir():
        raise UserError(f"{flag} needs --inputs to be one folder, not {' '.join(map(str, inputs))}")
    pattern = _EPOCH if updates is None else _UPDATE
    numbered = [(int(match[1]), path) for path in inputs[0].iterdir() if (match := pattern.fullmatch(path.name))]
    within = sorted((number, path) for number, path in numbered if upper_bound is None or number <= upper_bound)
    if len(within) < count:
        bound = "" if upper_bound is None else f" up to {upper_bound}"
        raise UserError(f"{flag} ({count}): {inputs[0]} has only {len(within)} such checkpoints{bound}")
    return [path for _, path in within[-count:]]


class _Input(NamedTuple):
    path: Path
    checkpoint: Mapping[str, Any]
    weights: Mapping[str, Tensor]


def average(paths: list[Path]) -> dict[str, Any]:
    """The last file's checkpoint with the mean of all weights, without optimizer state.

    Sums are in float64, the result in the weights' own dtype; one tensor of every file is in memory at a time.

    Raises:
        UserError: naming the file and what differs, if they are not checkpoints of one model, or a weight is not
            finite.
    """
    inputs = []
    for path in paths:
        checkpoint = read_checkpoint(path)
        inputs.append(_Input(path, checkpoint, weights_of(checkpoint, path)))
    for other in inputs[1:]:
        for difference in _differences(other, inputs[0]):
            raise UserError(f"{other.path} is not the model of {paths[0]}: {difference}")
    shared: dict[tuple[Any, ...], Tensor] = {}
    means: OrderedDict[str, Tensor] = OrderedDict()
    for name, value in inputs[-1].weights.items():
        identity = (value.data_ptr(), value.shape) if value.numel() else (name,)
        if identity not in shared:  # tied weights stay tied
            shared[identity] = _mean(name, inputs)
        means[name] = shared[identity]
    kept = {name: value for name, value in inputs[-1].checkpoint.items() if name not in ("model", OPTIMIZER_STATE)}
    return {**kept, "model": means}


def _files(inputs: list[Path]) -> list[Path]:
    for path in inputs:
        if path.is_dir():
            raise UserError(f"--inputs {path} is a folder: give --num-epoch-checkpoints or --num-update-checkpoints")
        if path.suffix not in SUFFIXES:
            raise UserError(f"--inputs {path}: the name must end in {' or '.join(SUFFIXES)}")
    return inputs


def _mean(name: str, inputs: list[_Input]) -> Tensor:
    first, last = inputs[0].weights[name], inputs[-1].weights[name]
    if first.dim() == 0 and not first.is_floating_point():
        return last  # counts what the model has seen: the last file's, as the rest of its progress
    total = torch.zeros_like(first, dtype=torch.float64)
    for path, _, weights in inputs:
        value = weights[name]
        if not value.is_floating_point():
            if not torch.equal(value, first):
                raise UserError(f"{path} is not the model of {inputs[0].path}: {name}, which is no weight, differs")
        elif not torch.isfinite(value).all():
            raise UserError(f"{path}: {name} has values that are not finite")
        total += value
    return total.div_(len(inputs)).to(first.dtype) if first.is_floating_point() else first


def _differences(other: _Input, first: _Input) -> Iterator[str]:
    """Why ``other`` is no checkpoint of the model that ``first`` is of."""
    if fingerprint_of(other.weights) != fingerprint_of(first.weights):
        yield "it has another dictionary"
    ours, theirs = _function_settings(first.checkpoint), _function_settings(other.checkpoint)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            yield f"{'--arch' if name == '_name' else flag(name)} is {theirs.get(name)} in it, {ours.get(name)} there"
    for name in sorted(first.weights.keys() | other.weights.keys()):
        shapes = [tuple(found[name].shape) if name in found else "missing" for found in (other.weights, first.weights)]
        if shapes[0] != shapes[1]:
            yield f"{name} is {shapes[0]} in it, {shapes[1]} there"


def _function_settings(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Stored options of the model that decide what its weights stand for, not how they are trained or computed."""
    free = [name for kind in ("training", "nothing") for name in options_with(affects=kind)]
    settings = (checkpoint.get("cfg") or {}).get("model") or {}
    return {name: value for name, value in settings.items() if name not in free and value is not None}
