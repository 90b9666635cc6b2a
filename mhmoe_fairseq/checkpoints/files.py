"""Checkpoints on disk: fairseq's ``.pt`` and ``.safetensors`` with everything that a ``.pt`` holds.

Nothing in a file is ever run: ``.pt`` is read with ``weights_only=True``, safetensors hold bytes and JSON. Tensors are
mapped, not read, until they are used.

A safetensors file of ours has the weights under their names in the model, the other tensors under their keys in the
checkpoint, and in its metadata ``format`` (pt), ``mhmoe_checkpoint`` (the version, 1), ``cfg`` (fairseq's
configuration as JSON) and ``checkpoint`` (all the rest as JSON, see :mod:`.json`).
"""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..common.errors import UserError
from ..common.files import atomic_path, refuse_path_separator
from ..data.tensor_files import load_tensors, unreadable, without_wrapper
from .json import TensorTable, decode, encode

SUFFIXES = (".pt", ".safetensors")
OPTIMIZER_STATE = "last_optimizer_state"  # fairseq's name of that entry
_VERSION = "1"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint as fairseq's dictionary; its tensors are mapped from the file and must not be written to.

    A safetensors file of other software comes as ``{"model": weights}``.

    Raises:
        UserError: if the file is missing, damaged, or holds something else.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    checkpoint = _read_safetensors(path) if path.suffix == ".safetensors" else load_tensors(path, mmap=True)
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: no readable checkpoint (it holds a {type(checkpoint).__name__}, not a dictionary)")
    return checkpoint


def read_trained(path: Path) -> dict[str, Any]:
    """A ``.pt`` checkpoint with its configuration, its weights under the model's names; tensors are mapped, not read.

    Raises:
        FileNotFoundError: if there is no such file.
        UserError: if it is no checkpoint of fairseq's.
    """
    loaded = load_tensors(path, mmap=True)
    if not isinstance(loaded, dict) or not {"model", "cfg"} <= loaded.keys():
        raise UserError(f"{path}: no readable checkpoint (it has no model and configuration of fairseq)")
    return {**loaded, "model": without_wrapper(loaded["model"])}


def write_checkpoint(checkpoint: dict[str, Any], path: Path, *, overwrite: bool) -> None:
    """Write under a temporary name in the same folder, flush, then rename.

    Raises:
        UserError: if the suffix is unknown, the file exists and may not be replaced, the disk is full, or the
            checkpoint holds what the format cannot.
    """
    check_output(path, overwrite=overwrite)
    with atomic_path(path) as temporary:
        if path.suffix == ".safetensors":
            _write_safetensors(checkpoint, temporary, path)
        else:
            with open(temporary, "wb") as stream:
                torch.save(_compact(checkpoint, {}), stream)


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raise ``UserError`` before long work if ``path`` cannot become a checkpoint."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: the name must end in {' or '.join(SUFFIXES)}")
    refuse_path_separator(path, "output")
    if path.is_dir():
        raise UserError(f"{path} is a folder: name the file to write")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists: give --overwrite to replace it")


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise unreadable(path, error) from error
    version = metadata.get("mhmoe_checkpoint")
    if version is None:
        return {"model": OrderedDict(tensors)}
    if version != _VERSION:
        raise UserError(f"checkpoint {path}: its layout {version} is not known to this version (it knows {_VERSION})")
    try:
        parts = {name: json.loads(metadata[name]) for name in ("cfg", "checkpoint")}
        checkpoint = decode(parts["checkpoint"], tensors)
        # The configuration keeps its position among the entries.
        return {key: decode(parts["cfg"], tensors) if key == "cfg" else value for key, value in checkpoint.items()}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"checkpoint {path}: its metadata are damaged ({error!r})") from error


def _write_safetensors(checkpoint: dict[str, Any], temporary: Path, path: Path) -> None:
    table = TensorTable()
    try:
        parts = {
            "cfg": encode(checkpoint.get("cfg"), table, ("cfg",)),
            "checkpoint": {
                key: None if key == "cfg" else encode(value, table, (key,)) for key, value in checkpoint.items()
            },
        }
        metadata = {name: json.dumps(value, allow_nan=False) for name, value in parts.items()}
        tensors = {name: tensor.detach().contiguous() for name, tensor in table.tensors.items()}
        safetensors.torch.save_file(tensors, temporary, {"format": "pt", "mhmoe_checkpoint": _VERSION, **metadata})
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: this checkpoint does not fit into safetensors: {error}") from error


def _compact(value: Any, seen: dict[int, Tensor]) -> Any:
    """The same without what tensors do not show of their storages; shared tensors stay shared.

    ``torch.save`` writes whole storages, even for a small view. An empty tensor from a mapped file has the address of
    its neighbour there, which ``torch.save`` takes for sharing.
    """
    if torch.is_tensor(value):
        if value.numel() and value.untyped_storage().nbytes() == value.nbytes:
            return value
        return seen.setdefault(id(value), value.clone())
    if isinstance(value, (list, tuple)):
        return type(value)(_compact(item, seen) for item in value)
    if isinstance(value, dict):
        return type(value)((key, _compact(item, seen)) for key, item in value.items())
    return value
