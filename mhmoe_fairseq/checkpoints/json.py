"""A checkpoint's structure as JSON, its tensors apart: what a safetensors file can hold, without loss.

JSON has no tuples, no keys but strings and no infinities, and tensors stand all over a checkpoint of fairseq.
What JSON lacks is written as an object with one key that begins with ``$``:

``{"$tensor": NAME}``, ``{"$scalar": [DTYPE, BYTES]}``, ``{"$tuple": [...]}``, ``{"$dict": [[KEY, VALUE], ...]}``,
``{"$ordered": [[KEY, VALUE], ...]}``, ``{"$float": "inf"}``.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_MODEL = "model"


class TensorTable:
    """The tensors of a checkpoint by unique names; one that two entries share (tied weights) is held once.

    Weights keep their names in the model; others are named by their keys (``last_optimizer_state.state.0.exp_avg``).
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}

    def add(self, tensor: Tensor, keys: tuple[str, ...]) -> str:
        """The name under which ``tensor`` is held."""
        identity = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else keys
        if identity not in self._names:
            name = unused = ".".join(keys[1:] if keys[0] == _MODEL and len(keys) > 1 else keys)
            number = 1
            while name in self.tensors:
                number += 1
                name = f"{unused}#{number}"
            self.tensors[name] = tensor
            self._names[identity] = name
        return self._names[identity]


def encode(value: Any, table: TensorTable, keys: tuple[str, ...] = ()) -> Any:
    """``value`` for ``json.dumps``; its tensors go into ``table``.

    Args:
        keys: of the entries that lead to ``value``, for names and errors.

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
    pairs = [
        (encode(key, table, (*keys, "key")), encode(item, table, (*keys, str(key)))) for key, item in value.items()
    ]
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
