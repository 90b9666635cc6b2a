"""Checkpoints on disk: fairseq's ``.pt`` and ``.safetensors`` with everything that a ``.pt`` holds.

Nothing in a file is ever run: ``.pt`` is read with ``weights_only=True``, safetensors hold bytes and JSON. Tensors are
mapped, not read, until they are used.

A safetensors file of ours has the weights under their names in the model, the other tensors under their keys in the
checkpoint (``last_optimizer_state.state.0.exp_avg``), and in its metadata ``format`` (pt), ``mhmoe_checkpoint`` (the
version, 1), ``cfg`` (fairseq's configuration) and ``checkpoint`` (all the rest) as JSON. JSON has no tuples, no keys
but strings and no infinities; what it lacks is written as an object with one key that begins with ``$``:
``{"$tensor": NAME}``, ``{"$scalar": [DTYPE, BYTES]}``, ``{"$tuple": [...]}``, ``{"$dict": [[KEY, VALUE], ...]}``,
``{"$ordered": [[KEY, VALUE], ...]}``, ``{"$float": "inf"}``.
"""

import itertools
import json
import math
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..common.errors import UserError
from ..common.files import atomic_path, refuse_path_separator
from ..data.tensor_files import load_tensors, unreadable, without_wrapper

SUFFIXES = (".pt", ".safetensors")
OPTIMIZER_STATE = "last_optimizer_state"  # fairseq's name of that entry
_MODEL = "model"
_VERSION = "1"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint as fairseq's dictionary; its tensors are mapped from the file and must not be written to.

    A safetensors file of other software comes as ``{"model": weights}``.

    Raises:
        FileNotFoundError: if there is no such file.
        UserError: if it is damaged or holds something else.
    """
    checkpoint = _read_safetensors(path) if path.suffix == ".safetensors" else load_tensors(path, mmap=True)
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path}: no readable checkpoint (it holds a {type(checkpoint).__name__}, not a dictionary)")
    return checkpoint


def read_trained(path: Path) -> dict[str, Any]:
    """A ``.pt`` checkpoint of fairseq's, its weights under the model's names; tensors are mapped, not read.

    Raises:
        FileNotFoundError: if there is no such file.
        UserError: if it has no weights and configuration.
    """
    loaded = load_tensors(path, mmap=True)
    if not isinstance(loaded, dict) or not loaded.keys() >= {"model", "cfg"}:
        raise UserError(f"{path}: no readable checkpoint (it has no model and configuration of fairseq)")
    return {**loaded, "model": without_wrapper(loaded["model"])}


def write_checkpoint(checkpoint: dict[str, Any], path: Path, *, overwrite: bool) -> None:
    """Write atomically; ``UserError`` as ``check_output``'s, on a full disk, or for what the format cannot hold."""
    check_output(path, overwrite=overwrite)
    with atomic_path(path) as temporary:
        if path.suffix == ".safetensors":
            _write_safetensors(checkpoint, temporary, path)
        else:
            with open(temporary, "wb") as stream:  # its own writer hides the system's error of a full disk
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
        cfg, checkpoint = (decode(json.loads(metadata[name]), tensors) for name in ("cfg", "checkpoint"))
        # The configuration keeps its position among the entries.
        return {key: cfg if key == "cfg" else value for key, value in checkpoint.items()}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"checkpoint {path}: its metadata are damaged ({error!r})") from error


def _write_safetensors(checkpoint: dict[str, Any], temporary: Path, path: Path) -> None:
    table = TensorTable()
    try:
        encoded = {key: encode(value, table, (key,)) for key, value in checkpoint.items()}
        parts = {"cfg": encoded.get("cfg"), "checkpoint": {**encoded, **({"cfg": None} if "cfg" in encoded else {})}}
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


class TensorTable:
    """The tensors of a checkpoint by unique names; one that two entries share (tied weights) is held once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}

    def add(self, tensor: Tensor, keys: tuple[str, ...]) -> str:
        """The name under which ``tensor`` is held."""
        identity = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else keys
        if identity not in self._names:
            plain = ".".join(keys[1:] if keys[0] == _MODEL and len(keys) > 1 else keys)
            names = itertools.chain([plain], (f"{plain}#{number}" for number in itertools.count(2)))
            self._names[identity] = next(name for name in names if name not in self.tensors)
            self.tensors[self._names[identity]] = tensor
        return self._names[identity]


def encode(value: Any, table: TensorTable, keys: tuple[str, ...] = ()) -> Any:
    """``value`` for ``json.dumps``; its tensors go into ``table``.

    Args:
        keys: of the entries that lead to ``value``, for the names of tensors.

    Raises:
        ValueError: naming the keys of an object that is no plain data.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(value)}
    if torch.is_tensor(value):
        if value.dim() == 0 and keys[0] != _MODEL:  # meters: thousands of them would drown the weights
            content = bytes(value.detach().cpu().reshape(1).view(torch.uint8).tolist())
            return {"$scalar": [str(value.dtype).removeprefix("torch."), content.hex()]}
        return {"$tensor": table.add(value, keys)}
    if isinstance(value, (list, tuple)):
        items = [encode(item, table, (*keys, str(index))) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if type(value) not in (dict, OrderedDict):
        raise ValueError(f"{'.'.join(keys)} is a {type(value).__name__}: only plain data and tensors can be written")
    pairs = [(encode(key, table, keys), encode(item, table, (*keys, str(key)))) for key, item in value.items()]
    if type(value) is OrderedDict:
        return {"$ordered": pairs}
    plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
    return dict(pairs) if plain else {"$dict": pairs}


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What ``encode`` was given.

    Raises:
        KeyError, TypeError, ValueError: if ``value`` was not made by ``encode``.
    """
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or not next(iter(value)).startswith("$"):
        return {key: decode(item, tensors) for key, item in value.items()}
    ((kind, content),) = value.items()
    if kind == "$tensor":
        return tensors[content]
    if kind == "$scalar":
        dtype = getattr(torch, content[0])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{content[0]!r} is no dtype")
        return torch.frombuffer(bytearray.fromhex(content[1]), dtype=dtype, count=1)[0].clone()
    if kind == "$float":
        return float(content)
    return {"$tuple": tuple, "$dict": dict, "$ordered": OrderedDict}[kind](decode(item, tensors) for item in content)
