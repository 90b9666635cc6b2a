"""The mean of several checkpoints' weights, chosen as fairseq's ``average_checkpoints.py`` does."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.errors import UserError
from ..common.ranges import flag
from ..models.options import options_with
from ..moe.quantize import packed_names
from .files import OPTIMIZER_STATE, SUFFIXES, read_checkpoint
from .summary import different_shapes, fingerprint_of, weights_of

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
        for path in inputs:
            if path.is_dir():
                raise UserError(f"--inputs {path} is a folder: give {flag} or --num-update-checkpoints")
            if path.suffix not in SUFFIXES:
                raise UserError(f"--inputs {path}: the name must end in {' or '.join(SUFFIXES)}")
        return inputs
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
    means = mean_weights(paths, weights_of_one_model(paths, checkpoints))
    kept = {name: value for name, value in checkpoints[-1].items() if name not in ("model", OPTIMIZER_STATE)}
    return {**kept, "model": means}


def weights_of_one_model(paths: Sequence[Path], checkpoints: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Tensor]]:
    """The checkpoints' weights; ``UserError`` naming the file and what differs, if they are not of one model."""
    weights = [weights_of(checkpoint, path) for checkpoint, path in zip(checkpoints, paths)]
    for path, state in zip(paths, weights):
        if packed_names(state):
            raise UserError(f"{path} is packed: average the checkpoints that were packed, and pack the mean")
    settings = [_function_settings(checkpoint) for checkpoint in checkpoints]
    for path, state, flags in zip(paths, weights, settings):
        for difference in _differences(weights[0], state, settings[0], flags):
            raise UserError(f"{path} is not the model of {paths[0]}: {difference}")
    classes = [(checkpoint.get("task_state") or {}).get("classes") for checkpoint in checkpoints]
    for path, names in zip(paths, classes):
        if names != classes[0]:
            raise UserError(f"{path} has other classes, or in another order, than {paths[0]}: {names}, {classes[0]}")
    return weights


def mean_weights(paths: Sequence[Path], weights: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of every tensor, computed in float64; tied weights stay tied, and counts are the last file's.

    Raises:
        UserError: naming the file and the weight that is not finite.
    """
    shared: dict[tuple[Any, ...], Tensor] = {}
    means = {}
    for name, value in weights[-1].items():
        identity = (value.data_ptr(), value.shape) if value.numel() else (name,)
        if identity not in shared:
            shared[identity] = _mean(name, paths, [state[name] for state in weights])
        means[name] = shared[identity]
    return means


def _mean(name: str, paths: Sequence[Path], values: Sequence[Tensor]) -> Tensor:
    first = values[0]
    if first.dim() == 0 and not first.is_floating_point():
        return values[-1]  # counts what the model has seen: the last file's, as the rest of its progress
    total = torch.zeros_like(first, dtype=torch.float64)
    for path, value in zip(paths, values):
        if not value.is_floating_point():
            if not torch.equal(value, first):
                raise UserError(f"{path} is not the model of {paths[0]}: {name}, which is no weight, differs")
        elif not torch.isfinite(value).all():
            raise UserError(f"{path}: {name} has values that are not finite")
        total += value
    return total.div_(len(values)).to(first.dtype) if first.is_floating_point() else first


def _differences(
    first: Mapping[str, Tensor], other: Mapping[str, Tensor], there: Mapping[str, Any], here: Mapping[str, Any]
) -> Iterator[str]:
    """Why ``other`` weights, with the settings ``here``, are not of the model that ``first`` are of."""
    if fingerprint_of(other) != fingerprint_of(first):
        yield "it has another dictionary"
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            yield f"{'--arch' if name == '_name' else flag(name)} is {here.get(name)} in it, {there.get(name)} there"
    yield from (f"{name} is {shape} in it, {others} there" for name, shape, others in different_shapes(other, first))


def _function_settings(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Stored options of the model that decide what its weights stand for, not how they are trained or computed."""
    free = [name for kind in ("training", "nothing") for name in options_with(affects=kind)]
    settings = (checkpoint.get("cfg") or {}).get("model") or {}
    return {name: value for name, value in settings.items() if name not in free and value is not None}
