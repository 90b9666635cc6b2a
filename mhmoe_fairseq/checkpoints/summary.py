"""What a checkpoint holds, for ``mhmoe checkpoint inspect``, and parameters by the part of the model."""

import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.errors import UserError
from ..data.identity import MANIFEST, identify_data, identify_manifest
from ..data.tensor_files import without_wrapper
from ..moe.quantize import without_packing
from .files import OPTIMIZER_STATE

_EXPERT_BANK = re.compile(r"(.*)\.experts\.fc1_weight")
_FINGERPRINT = re.compile(r"(.*\.)?vocabulary_fingerprint")
# What training changes without gradients, and tables: no parameters. In exported folders they have other names.
_BUFFER = re.compile(
    r".*\.(gate\.balancing\.bias|gate\.adaptive\.weight|running_mean|xpos\.scale"
    r"|router\.selection_bias|router\.regularizer|center)"
)
# The first pattern found in a name decides; a norm inside a part counts there.
_PARTS = {
    "task heads": r"^(heads|classification_heads)\.",
    "experts": r"\.experts\.",
    "shared experts": r"\.shared_expert\.",
    "routers": r"\.router\.",
    "head and merge projections": r"\.(head|merge)_projection\.",
    "attention": r"\.self_attn\.",
    "dense networks": r"\.ffn\.",
    "text embedding": r"\.(text_embed|embed_tokens)\.",
    "patch embedding": r"\.vision_embed\.",
    "positions": r"\.embed_positions\.",
    "text head": r"^text_head\.|\.output_projection\.",
    "image head": r"^image_head\.",
    "norms": r"norm",
}


@dataclass(frozen=True)
class CheckpointSummary:
    """Figures of one file; None stands for what it does not tell."""

    path: Path
    file_bytes: int
    arch: str | None  # the architecture by name; None if no configuration is stored
    updates: int | None
    epoch: int | None
    best: float | None  # validation loss
    world_size: int | None  # ranks of the training that wrote it
    settings: dict[str, Any]  # the stored options of the model that were given
    parameters: dict[str, int]  # by part of the model; a weight that two names share is counted once
    experts: dict[str, int]  # experts in each pool, by its name: an MoE layer's, or a modality's in it
    dtypes: dict[str, int]  # bytes of weights by dtype
    optimizer: str | None  # its name; None if its state is not there
    optimizer_tensors: int
    optimizer_bytes: int
    complete: bool  # every parameter has a first and a second moment of its size
    fingerprint: str | None  # SHA-256 of the dictionary's symbols
    data: str | None  # the stored data folder
    corpus: str | None  # the corpus's hash, if that folder or a manifest is at hand

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
    unique = list(unique_weights(weights))
    parameters = dict(parameters_of(without_packing(dict(unique))))
    settings = _entry(checkpoint, "cfg", "model")
    history = checkpoint.get("optimizer_history")
    progress = _entry({"last": history[-1] if isinstance(history, list) and history else None}, "last")
    extra = _entry(checkpoint, "extra_state")
    iterator = _entry(extra, "train_iterator")
    state = _entry(checkpoint, OPTIMIZER_STATE)
    state_tensors = list(_tensors(state))
    steps = [_entry(of_one).get("step") for of_one in _entry(state, "state").values()]
    moments = [
        tensor.numel()
        for tensor in _tensors(_entry(state, "state")) if not any(tensor is step for step in steps)
    ]  # fmt: skip
    data = _entry(checkpoint, "cfg", "task").get("data")
    dtypes: Counter[str] = Counter()
    for _, value in unique:
        dtypes[str(value.dtype).removeprefix("torch.")] += value.nbytes
    return CheckpointSummary(
        path=path,
        file_bytes=path.stat().st_size,
        arch=settings.get("_name"),
        updates=progress.get("num_updates"),
        epoch=iterator.get("epoch", extra.get("epoch")),
        best=extra.get("best"),
        world_size=iterator.get("num_shards"),
        settings={name: value for name, value in settings.items() if value not in (None, False) and name != "_name"},
        parameters=count_parts(parameters.items()),
        experts={match[1]: len(value) for name, value in weights.items() if (match := _EXPERT_BANK.fullmatch(name))},
        dtypes=dict(dtypes),
        optimizer=progress.get("optimizer_name") if state else None,
        optimizer_tensors=len(state_tensors),
        optimizer_bytes=sum(tensor.nbytes for tensor in state_tensors),
        complete=sorted(moments) == sorted(2 * [value.numel() for value in parameters.values()]),
        fingerprint=fingerprint_of(weights),
        data=data,
        corpus=_corpus(path, data),
    )


def parameters_of(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The parameters among a state's tensors, with their names: no buffers, no whole numbers."""
    return ((name, value) for name, value in state.items() if value.is_floating_point() and not _BUFFER.fullmatch(name))


def count_parts(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Numbers of named parameters by the part of the model; ``other`` is what no pattern fits."""
    sums: Counter[str] = Counter()
    for name, value in parameters:
        sums[next((part for part, pattern in _PARTS.items() if re.search(pattern, name)), "other")] += value.numel()
    return {part: sums[part] for part in (*_PARTS, "other") if part in sums}


def weights_of(checkpoint: Any, path: Path) -> Mapping[str, Tensor]:
    """The model's state, under the model's own names.

    Raises:
        UserError: if there is none.
    """
    weights = checkpoint.get("model") if isinstance(checkpoint, Mapping) else None
    if not isinstance(weights, Mapping) or not weights or not all(map(torch.is_tensor, weights.values())):
        raise UserError(f"{path} is not a checkpoint of a model: no weights under 'model'")
    return without_wrapper(weights)


def unique_weights(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor with its name, one that two names share once."""
    seen = set()
    for name, value in weights.items():
        identity = (value.data_ptr(), value.shape)
        if value.numel() == 0 or identity not in seen:
            seen.add(identity)
            yield name, value


def different_shapes(
    weights: Mapping[str, Tensor], others: Mapping[str, Tensor]
) -> Iterator[tuple[str, tuple[int, ...] | str, tuple[int, ...] | str]]:
    """Every name whose tensors differ in shape, with the two shapes; ``missing`` stands for one that is not there."""
    for name in sorted(weights.keys() | others.keys()):
        shape, other = (tuple(found[name].shape) if name in found else "missing" for found in (weights, others))
        if shape != other:
            yield name, shape, other


def fingerprint_of(weights: Mapping[str, Tensor]) -> str | None:
    """SHA-256 of the dictionary's symbols, one a line, as a hexadecimal number."""
    stored = next((value for name, value in weights.items() if _FINGERPRINT.fullmatch(name)), None)
    return None if stored is None else struct.pack("<4q", *stored.tolist()).hex()


def _corpus(path: Path, data: Any) -> str | None:
    """From a manifest beside the checkpoint, else from the data folder, if there is one of them."""
    try:
        if (path.parent / MANIFEST).is_file():
            return identify_manifest(path.parent / MANIFEST).digest
        folder = Path(str(data).split(":")[0]) if data else None
        return identify_data(folder).digest if folder is not None and folder.is_dir() else None
    except ValueError:
        return None


def _entry(value: Any, *keys: str) -> Mapping[str, Any]:
    """The dictionary at the end of a path of keys; empty where there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def _tensors(value: Any) -> Iterator[Tensor]:
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)
