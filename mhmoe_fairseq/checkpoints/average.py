"""The mean of several checkpoints' weights, chosen as fairseq's ``average_checkpoints.py`` does."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.errors import UserError
from ..models.options import options_with
from .files import SUFFIXES, read_checkpoint
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


def average(paths: list[Path]) -> dict[str, Any]:
    """The last file's checkpoint with the mean of all weights, without optimizer state.

    Sums are in float64, the result in the weights' own dtype; one tensor of every file is in memory at a time.

    Raises:
        UserError: naming the file and what differs, if they are not checkpoints of one model, or a weight is not
            finite.
    """
    checkpoints = [read_checkpoint(path) for path in paths]
    states = [weights_of(checkpoint, path) for checkpoint, path in zip(checkpoints, paths)]
    for path, checkpoint, state in zip(paths[1:], checkpoints[1:], states[1:]):
        _require_same_model(path, checkpoint, state, paths[0], checkpoints[0], states[0])
    shared: dict[tuple[Any, ...], Tensor] = {}
    means: OrderedDict[str, Tensor] = OrderedDict()
    for name, value in states[-1].items():
        identity = (value.data_ptr(), value.shape) if value.numel() else (name,)
        if identity not in shared:  # tied weights stay tied
            shared[identity] = _mean(name, [state[name] for state in states], paths)
        means[name] = shared[identity]
    kept = {key: value for key, value in checkpoints[-1].items() if key not in ("model", "last_optimizer_state")}
    return {**kept, "model": means}


def _files(inputs: list[Path]) -> list[Path]:
    for path in inputs:
        if path.is_dir():
            raise UserError(f"--inputs {path} is a folder: give --num-epoch-checkpoints or --num-update-checkpoints")
        if path.suffix not in SUFFIXES:
            raise UserError(f"--inputs {path}: the name must end in {' or '.join(SUFFIXES)}")
    return inputs


def _mean(name: str, values: list[Tensor], paths: list[Path]) -> Tensor:
    if not values[0].is_floating_point():
        if values[0].dim() == 0:  # counts what the model has seen: the last file's, as the rest of its progress
            return values[-1]
        for value, path in zip(values, paths):
            if not torch.equal(value, values[0]):
                raise UserError(f"{path} is not the model of {paths[0]}: {name}, which is no weight, differs")
        return values[0]
    total = torch.zeros_like(values[0], dtype=torch.float64)
    for value, path in zip(values, paths):
        if not torch.isfinite(value).all():
            raise UserError(f"{path}: {name} has values that are not finite")
        total += value
    return total.div_(len(values)).to(values[0].dtype)


def _require_same_model(
    path: Path, checkpoint: Mapping[str, Any], state: Mapping[str, Tensor],
    first_path: Path, first: Mapping[str, Any], first_state: Mapping[str, Tensor],
) -> None:  # fmt: skip
    if fingerprint_of(state) != fingerprint_of(first_state):
        raise UserError(f"{path} is not the model of {first_path}: it has another dictionary")
    ours, theirs = _function_settings(first), _function_settings(checkpoint)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            flag = "--arch" if name == "_name" else f"--{name.replace('_', '-')}"
            raise UserError(
                f"{path} is not the model of {first_path}: {flag} is {theirs.get(name)} in it, {ours.get(name)} there"
            )
    for name in sorted(first_state.keys() | state.keys()):
        shapes = [tuple(weights[name].shape) if name in weights else "missing" for weights in (state, first_state)]
        if shapes[0] != shapes[1]:
            raise UserError(f"{path} is not the model of {first_path}: {name} is {shapes[0]} in it, {shapes[1]} there")


def _function_settings(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Stored options of the model that decide what its weights stand for, not how they are trained or computed."""
    free = [name for kind in ("training", "nothing") for name in options_with(affects=kind)]
    settings = (checkpoint.get("cfg") or {}).get("model") or {}
    return {name: value for name, value in settings.items() if name not in free and value is not None}
