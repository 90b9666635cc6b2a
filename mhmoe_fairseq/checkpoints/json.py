"""A checkpoint's structure as JSON, its tensors apart: what a safetensors file can hold, without loss.

JSON has no tuples, no keys but strings and no infinities, and a checkpoint of fairseq holds tensors at many places.
What JSON lacks is written as an object with one key that begins with ``$``:

``{"$tensor": NAME}``, ``{"$scalar": [DTYPE, BYTES]}``, ``{"$tuple": [...]}``, ``{"$dict": [[KEY, VALUE], ...]}``,
``{"$ordered": [[KEY, VALUE], ...]}``, ``{"$float": "inf"}``.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_MODEL = "model"


class TensorTable:
    """The tensors of a checkpoint by unique names; one that stands at two places (tied weights) is held once.

    Weights keep their names in the model; others are named by their place (``last_optimizer_state.state.0.exp_avg``).
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}

    def add(self, tensor: Tensor, place: tuple[str, ...]) -> str:
        """The name under which ``tensor`` is held."""
        geometry = (tensor.dtype, tuple(tensor.shape), tensor.stride())
        identity = (tensor.data_ptr(), *geometry) if tensor.numel() else place
        if identity not in self._names:
            name = unused = ".".join(place[1:] if place[0] == _MODEL and len(place) > 1 else place)
            number = 1
            while name in self.tensors:
                number += 1
                name = f"{unused}#{number}"
            self.tensors[name] = tensor
            self._names[identity] = name
        return self._names[identity]


def encode(value: Any, table: TensorTable, place: tuple[str, ...] = ()) -> Any:
    """``value`` for ``json.dumps``; its tensors go into ``table``.

    Raises:
        ValueError: naming the place of an object that is no plain data.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(value)}
    if torch.is_tensor(value):
        if value.dim() == 0 and place[0] != _MODEL:  # meters: thousands of them would drown the weights
            return {"$scalar": [str(value.dtype).removeprefix("torch."), _bytes(value).hex()]}
        return {"$tensor": table.add(value, place)}
    if isinstance(value, (list, tuple)):
        items = [encode(item, table, (*place, str(index))) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, Mapping) and type(value) in (dict, OrderedDict):
        pairs = [
            (encode(key, table, (*place, "key")), encode(item, table, (*place, str(key))))
            for key, item in value.items()
        ]
        if type(value) is OrderedDict:
            return {"$ordered": pairs}
        plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
        return dict(pairs) if plain else {"$dict": pairs}
    raise ValueError(f"{'.'.join(place)} is a {type(value).__name__}: only plain data and tensors can be written")


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What ``encode`` was given.

    Raises:
        KeyError, TypeError, ValueError: if ``value`` was not made by ``encode``.
    """
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1 and next(iter(value)).startswith("$"):
        ((kind, content),) = value.items()
        return _decode_tagged(kind, content, tensors)
    return {key: decode(item, tensors) for key, item in value.items()}


def _decode_tagged(kind: str, content: Any, tensors: Mapping[str, Tensor]) -> Any:
    if kind == "$tensor":
        return tensors[content]
    if kind == "$scalar":
        dtype = getattr(torch, content[0])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{content[0]!r} is no dtype")
        return torch.frombuffer(bytearray.fromhex(content[1]), dtype=dtype, count=1)[0].clone()
    if kind == "$float":
        return float(content)
    if kind == "$tuple":
        return tuple(decode(item, tensors) for item in content)
    if kind in ("$dict", "$ordered"):
        pairs = ((decode(key, tensors), decode(item, tensors)) for key, item in content)
        return OrderedDict(pairs) if kind == "$ordered" else dict(pairs)
    raise ValueError(f"{kind!r} is no kind of value")


def _bytes(scalar: Tensor) -> bytes:
    return bytes(scalar.detach().cpu().reshape(1).view(torch.uint8).tolist())
