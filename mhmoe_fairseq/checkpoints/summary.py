"""What a checkpoint holds, for ``mhmoe checkpoint inspect``."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.errors import UserError
from ..data.identity import identify_data, identify_manifest
from ..data.tensor_files import without_wrapper
from .parts import by_part

_EXPERT_BANK = re.compile(r"(.*)\.experts\.fc1_weight")
_FINGERPRINT = re.compile(r"(.*\.)?vocabulary_fingerprint")


@dataclass(frozen=True)
class CheckpointSummary:
    """Figures of one file.

    Attributes:
        path, file_bytes: the file.
        arch: its architecture by name; None if no configuration is stored.
        updates, epoch, best: how far the training was, and its best validation loss.
        world_size: ranks of the training that wrote it, if it tells.
        settings: the stored options of the model that were given.
        parameters: by part of the model; a weight that two names share is counted once.
        experts: experts in each pool, by its name: an MoE layer's, or that of a modality in it.
        dtypes: bytes of weights by dtype.
        optimizer: its name; None if there is no state of it.
        optimizer_tensors, optimizer_bytes: its state.
        complete: every parameter has its state.
        fingerprint: SHA-256 of the dictionary's symbols; None if there is none.
        data, corpus: the stored data folder, and the hash of the corpus if that folder or a manifest is at hand.
    """

    path: Path
    file_bytes: int
    arch: str | None
    updates: int | None
    epoch: int | None
    best: float | None
    world_size: int | None
    settings: dict[str, Any]
    parameters: dict[str, int]
    experts: dict[str, int]
    dtypes: dict[str, int]
    optimizer: str | None
    optimizer_tensors: int
    optimizer_bytes: int
    complete: bool
    fingerprint: str | None
    data: str | None
    corpus: str | None

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.parameters.values())


def summarize(path: Path, checkpoint: Mapping[str, Any]) -> CheckpointSummary:
    """Figures of a checkpoint that ``read_checkpoint`` gave; no tensor but the fingerprint is read.

    Raises:
        UserError: if there are no weights in it.
    """
    weights = weights_of(checkpoint, path)
    unique = list(_unique(weights))
    settings = _section(checkpoint, "model")
    progress = _last(checkpoint.get("optimizer_history"))
    extra = _mapping(checkpoint.get("extra_state"))
    iterator = _mapping(extra.get("train_iterator"))
    state = _mapping(checkpoint.get("last_optimizer_state"))
    state_tensors = list(_tensors(state))
    data = _section(checkpoint, "task").get("data")
    return CheckpointSummary(
        path=path,
        file_bytes=path.stat().st_size,
        arch=settings.get("_name"),
        updates=progress.get("num_updates"),
        epoch=iterator.get("epoch", extra.get("epoch")),
        best=extra.get("best"),
        world_size=iterator.get("num_shards"),
        settings={name: value for name, value in settings.items() if value not in (None, False) and name != "_name"},
        parameters=by_part((name, value.numel()) for name, value in unique if value.is_floating_point()),
        experts={match[1]: len(value) for name, value in weights.items() if (match := _EXPERT_BANK.fullmatch(name))},
        dtypes=_by_dtype(unique),
        optimizer=progress.get("optimizer_name") if state else None,
        optimizer_tensors=len(state_tensors),
        optimizer_bytes=sum(tensor.nbytes for tensor in state_tensors),
        complete=_is_complete(state, [value for _, value in unique if value.is_floating_point()]),
        fingerprint=fingerprint_of(weights),
        data=data,
        corpus=_corpus(path, data),
    )


def weights_of(checkpoint: Mapping[str, Any], path: Path) -> Mapping[str, Tensor]:
    """The model's state, under the model's own names.

    Raises:
        UserError: if there is none.
    """
    weights = checkpoint.get("model")
    if not isinstance(weights, Mapping) or not weights or not all(map(torch.is_tensor, weights.values())):
        raise UserError(f"{path} is not a checkpoint of a model: no weights under 'model'")
    return without_wrapper(weights)


def fingerprint_of(weights: Mapping[str, Tensor]) -> str | None:
    """SHA-256 of the dictionary's symbols, one a line, as a hexadecimal number."""
    stored = next((value for name, value in weights.items() if _FINGERPRINT.fullmatch(name)), None)
    return None if stored is None else struct.pack("<4q", *stored.tolist()).hex()


def _unique(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    seen = set()
    for name, value in weights.items():
        identity = (value.data_ptr(), value.shape)
        if value.numel() == 0 or identity not in seen:
            seen.add(identity)
            yield name, value


def _by_dtype(weights: list[tuple[str, Tensor]]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for _, value in weights:
        dtype = str(value.dtype).removeprefix("torch.")
        sizes[dtype] = sizes.get(dtype, 0) + value.nbytes
    return sizes


def _is_complete(state: Mapping[str, Any], parameters: list[Tensor]) -> bool:
    """Every parameter of the model has a first and a second moment of its size."""
    entries = _mapping(state.get("state")).values()
    sizes = [sorted(value.numel() for value in _tensors(entry) if value.dim()) for entry in entries]
    return sorted(size for entry in sizes for size in entry) == sorted(2 * [value.numel() for value in parameters])


def _corpus(path: Path, data: Any) -> str | None:
    """From a manifest beside the checkpoint, else from the data folder, if there is one of them."""
    try:
        if (path.parent / "manifest.json").is_file():
            return identify_manifest(path.parent / "manifest.json").digest
        folder = Path(str(data).split(":")[0]) if data else None
        return identify_data(folder).digest if folder is not None and folder.is_dir() else None
    except ValueError:
        return None


def _section(checkpoint: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return _mapping(_mapping(checkpoint.get("cfg")).get(name))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _last(value: Any) -> Mapping[str, Any]:
    return _mapping(value[-1]) if isinstance(value, list) and value else {}


def _tensors(value: Any) -> Iterator[Tensor]:
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
