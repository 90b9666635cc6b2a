"""Which experts a trained model uses: routing counts summed over an evaluation set."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoints.open import open_model
from ...common.console import say
from ...common.errors import UserError
from ...common.files import read_json, sha256_of, write_json
from ...moe.stats import active_share, effective_share, load_max_over_mean
from .routing_counts import RoutingCounts, count_routing

ACTIVE_THRESHOLD = 0.01
POOLS = ("image", "text")  # the order of a layer's pools


@dataclass(frozen=True)
class Activation:
    """Counts of one model over one split.

    Attributes:
        checkpoint_sha256: of the file measured.
        data_digest: of the data, as ``data_identity`` computes it.
        split: ``valid`` or ``test`` or another.
        tokens: targets evaluated.
        loss: bits per token on them.
        layers: indices of the MoE layers in the decoder, from 0; of an encoder of images and text as in
            ``ExpertCounts``, of whose rows the following holds.
        load: per layer and expert, assignments (sub-token, choice) before dropping.
        dropped: per layer, assignments dropped for lack of capacity.
        entropy: per layer, the router's mean softmax entropy in nats.
    """

    checkpoint_sha256: str
    data_digest: str
    split: str
    tokens: int
    loss: float
    layers: list[int]
    load: list[list[float]]
    dropped: list[float]
    entropy: list[float]

    @classmethod
    def of(cls, counts: RoutingCounts, checkpoint_sha256: str, data_digest: str, split: str) -> Activation:
        """From counts over a whole split."""
        stats = [counts.layers[layer] for layer in sorted(counts.layers)]
        return cls(
            checkpoint_sha256=checkpoint_sha256,
            data_digest=data_digest,
            split=split,
            tokens=counts.tokens,
            loss=counts.bits / counts.tokens,
            layers=sorted(counts.layers),
            load=[layer.expert_load.tolist() for layer in stats],
            dropped=[float(layer.dropped) for layer in stats],
            entropy=[float(layer.entropy / layer.num_subtokens) for layer in stats],
        )

    @property
    def identity(self) -> tuple[str, str, str]:
        """What it belongs to: checkpoint, data, split."""
        return self.checkpoint_sha256, self.data_digest, self.split

    @property
    def row_names(self) -> list[str]:
        """The layers from 1; the modality beside it where a layer has a row for each."""
        names = []
        for row, layer in enumerate(self.layers):
            is_shared = self.layers.count(layer) == 1
            names.append(f"{layer + 1}" if is_shared else f"{layer + 1} {POOLS[self.layers[:row].count(layer)]}")
        return names

    @property
    def load_LE(self) -> Tensor:
        """``(layers, E)`` float64."""
        return torch.tensor(self.load, dtype=torch.float64)

    def active(self, threshold: float = ACTIVE_THRESHOLD) -> list[float]:
        """Per layer, the share of experts with at least ``threshold`` of the uniform load."""
        return active_share(self.load_LE, threshold).tolist()

    def effective(self) -> list[float]:
        """Per layer, ``exp(entropy of the load) / E``."""
        return effective_share(self.load_LE).tolist()

    def max_over_mean(self) -> list[float]:
        """Per layer, the largest load over the mean load."""
        return load_max_over_mean(self.load_LE).tolist()

    def overflow(self) -> list[float]:
        """Per layer, the share of assignments that were dropped."""
        return [dropped / max(sum(load), 1.0) for dropped, load in zip(self.dropped, self.load)]

    def relative_load(self) -> Tensor:
        """``(layers, E)``: each expert's share of its layer's assignments times E; 1 is uniform."""
        load_LE = self.load_LE
        return load_LE / load_LE.mean(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


def mean(values: list[float]) -> float | None:
    """Mean over layers; None without any."""
    return sum(values) / len(values) if values else None


def load_for_evaluation(
    checkpoint: Path, data: Path, overrides: dict[str, Any] | None = None
) -> tuple[torch.nn.Module, Any]:
    """The model in evaluation mode and its task, with the data taken from ``data``.

    Args:
        overrides: other settings to change, by name.

    Raises:
        ValueError: if the data's dictionary is not the checkpoint's.
        FileNotFoundError: if there is no data.
    """
    opened = open_model(checkpoint, data, overrides=overrides)
    return opened.model, opened.task


def load_moe_model(checkpoint: Path, data: Path, batch_size: int) -> tuple[torch.nn.Module, Any]:
    """As ``load_for_evaluation``, for a measurement of its experts.

    Raises:
        UserError: if the model has none.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size ({batch_size}) must be at least 1")
    model, task = load_for_evaluation(checkpoint, data)
    layers = model.beit3.encoder.layers if hasattr(model, "beit3") else model.decoder.layers
    if not any(layer.is_moe_layer for layer in layers):
        raise UserError(f"{checkpoint} is a dense model: it has no experts to measure")
    return model, task


def count_split(model: torch.nn.Module, task: Any, split: str, batch_size: int) -> RoutingCounts:
    """Evaluate a split in the blocks that the model was trained with.

    Raises:
        FileNotFoundError: if the split is missing.
    """
    task.load_dataset(split)
    batches = task.get_batch_iterator(
        task.dataset(split),
        max_sentences=batch_size,
        max_positions=model.max_positions(),
        required_batch_size_multiple=1,
    ).next_epoch_itr(shuffle=False)
    return count_routing(model, batches)


def measure_activation(checkpoint: Path, data: Path, split: str, data_digest: str, batch_size: int = 32) -> Activation:
    """Evaluate ``checkpoint`` on a split and sum its routing counts.

    Raises:
        ValueError: if the model has no MoE layers, or the data's dictionary is not the checkpoint's.
        FileNotFoundError: if the split is missing.
    """
    model, task = load_moe_model(checkpoint, data, batch_size)
    say(f"measuring the experts of {checkpoint} on {split}")
    return Activation.of(count_split(model, task, split, batch_size), sha256_of(checkpoint), data_digest, split)


def measured_activation(
    cache: Path, checkpoint: Path, data: Path, split: str, data_digest: str, batch_size: int = 32
) -> Activation:
    """As ``measure_activation``, kept in the JSON file ``cache`` and read from there if it is of the same files."""
    kept = read_activation(cache)
    if kept is not None and kept.identity == (sha256_of(checkpoint), data_digest, split):
        return kept
    activation = measure_activation(checkpoint, data, split, data_digest, batch_size)
    write_activation(cache, activation)
    return activation


def write_activation(path: Path, activation: Activation, threshold: float = ACTIVE_THRESHOLD) -> None:
    """The counts, and what follows from them, as JSON."""
    derived = {
        "threshold": threshold,
        "active": activation.active(threshold),
        "effective": activation.effective(),
        "load_max_over_mean": activation.max_over_mean(),
        "overflow": activation.overflow(),
    }
    write_json(path, {**asdict(activation), "derived": derived})


def read_activation(path: Path) -> Activation | None:
    """What ``measured_activation`` kept; None if there is no such file, or it is of another kind."""
    kept = read_json(path) if path.is_file() else {}
    fields = {key: value for key, value in kept.items() if key in Activation.__dataclass_fields__}
    return Activation(**fields) if len(fields) == len(Activation.__dataclass_fields__) else None
