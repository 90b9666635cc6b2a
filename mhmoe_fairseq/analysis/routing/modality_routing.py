"""Which experts images and texts use, alone and in pairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq import utils
from fairseq.logging import metrics
from omegaconf import OmegaConf
from torch import Tensor

from ...common.console import say
from ...common.files import read_json, sha256_of, write_json
from ...criterions.masked_multimodal import MODALITIES
from ...evaluation.modality_scores import expert_counts
from .activation import Activation, load_moe_model, read_activation, write_activation
from .expert_choices import IMAGE, TEXT, RoutedCall, distinct_experts, expert_layers, num_experts, recorded_choices
from .group_loads import GroupLoads
from .language_routing import activation_file

# What a group's positions are, in the order of tables.
GROUPS = ("image", "text", "image of pairs", "text of pairs")


@dataclass(frozen=True)
class ModalityRouting(GroupLoads):
    """Counts of one model over the positions of one split.

    Attributes:
        checkpoint_sha256, data_digest, split: as in ``Activation``.
        layers: indices of the MoE layers in the encoder, from 0.
        groups: those of ``GROUPS`` that the split has.
        positions: of each group, without padding.
        load: per group, layer and expert, assignments before dropping; where each modality has experts of its own, the
            text's follow the images'.
        distinct: per group and layer, the mean number of different experts of a position's sub-tokens.
        most_distinct: as many as there can be.
    """

    checkpoint_sha256: str
    data_digest: str
    split: str
    layers: list[int]
    groups: list[str]
    positions: list[int]
    load: list[list[list[float]]]
    distinct: list[list[float]]
    most_distinct: int


class GroupCounts:
    """Sums over the positions of every group.

    Args:
        layers: the MoE layers.
        experts: of a layer.
    """

    def __init__(self, layers: list[int], experts: int) -> None:
        self.layers, self.experts = layers, experts
        self.positions = dict.fromkeys(GROUPS, 0)
        self.load_GLE = torch.zeros(len(GROUPS), len(layers), experts, dtype=torch.float64)
        self.distinct_GL = torch.zeros(len(GROUPS), len(layers), dtype=torch.float64)

    def add(self, call: RoutedCall) -> None:
        """Count one call's positions."""
        for name, selected in group_positions(call):
            group = GROUPS.index(name)
            self.positions[name] += int(selected.sum())
            for place, layer in enumerate(self.layers):
                choices = call.choices[layer][selected]
                self.load_GLE[group, place] += torch.bincount(choices.flatten().cpu(), minlength=self.experts)
                self.distinct_GL[group, place] += int(distinct_experts(choices, self.experts).sum())

    def routing(self, identity: tuple[str, str, str], most_distinct: int) -> ModalityRouting:
        """What was counted."""
        kept = [place for place, name in enumerate(GROUPS) if self.positions[name]]
        positions = [self.positions[GROUPS[place]] for place in kept]
        means = self.distinct_GL[kept] / torch.tensor(positions, dtype=torch.float64)[:, None]
        return ModalityRouting(
            *identity,
            layers=self.layers,
            groups=[GROUPS[place] for place in kept],
            positions=positions,
            load=self.load_GLE[kept].tolist(),
            distinct=means.tolist(),
            most_distinct=most_distinct,
        )


def group_positions(call: RoutedCall) -> Iterator[tuple[str, Tensor]]:
    """The groups of a call, and bool ``(B, L)`` which positions are theirs."""
    is_image = torch.arange(call.is_real.size(1), device=call.is_real.device) < call.image_positions
    if call.modality in (IMAGE, TEXT):
        yield call.modality, call.is_real
    else:
        yield "image of pairs", call.is_real & is_image
        yield "text of pairs", call.is_real & ~is_image


def is_multimodal(settings: dict[str, dict[str, Any]]) -> bool:
    """Whether a checkpoint's stored configuration is of images and text."""
    return "img_size" in settings["task"]


def measured_modalities(
    folder: Path,
    checkpoint: Path,
    data: Path,
    split: str,
    data_digest: str,
    batch_size: int,
    criterion_settings: dict[str, Any],
) -> tuple[Activation, ModalityRouting]:
    """The routing of a split and of its modalities, kept in ``activation-SPLIT.json`` and ``modalities-SPLIT.json``.

    Files that are of the same checkpoint and data are read in place of measuring again.

    Args:
        criterion_settings: those that the checkpoint was trained with.

    Raises:
        ValueError, OSError: as ``measure_activation``.
    """
    identity = (sha256_of(checkpoint), data_digest, split)
    activation = read_activation(activation_file(folder, split))
    modalities = read_modalities(modalities_file(folder, split))
    if activation and modalities and activation.identity == modalities.identity == identity:
        return activation, modalities
    model, task = load_moe_model(checkpoint, data, batch_size)
    criterion = task.build_criterion(OmegaConf.create(criterion_settings)).eval()
    task.load_dataset(split)
    batches = task.get_batch_iterator(
        task.dataset(split), max_sentences=batch_size, required_batch_size_multiple=1
    ).next_epoch_itr(shuffle=False)
    say(f"measuring the experts of {checkpoint} on {split}, modality by modality")
    activation, modalities = _measure(model, criterion, batches, identity)
    write_activation(activation_file(folder, split), activation)
    write_modalities(modalities_file(folder, split), modalities)
    return activation, modalities


@torch.no_grad()
def _measure(
    model: torch.nn.Module, criterion: Any, batches: Iterable[dict[str, Any]], identity: tuple[str, str, str]
) -> tuple[Activation, ModalityRouting]:
    layers, experts = expert_layers(model), num_experts(model)
    config = model.beit3.encoder.layers[layers[0]].moe_layer.config
    counts, sums = GroupCounts(layers, experts), {}
    on_gpu = next(model.parameters()).is_cuda
    with recorded_choices(model) as calls:
        for batch in batches:
            log = criterion(model, utils.move_to_cuda(batch) if on_gpu else batch)[2]
            for key, value in log.items():
                sums[key] = sums.get(key, 0) + (value.double().cpu() if torch.is_tensor(value) else value)
            for modality, call in zip((name for name in MODALITIES if name in batch), calls, strict=True):
                if batch[modality].get("counted", True):
                    counts.add(call)
            calls.clear()
    routing = counts.routing(identity, min(config.num_experts, config.split_heads * config.top_k))
    return _activation(criterion, sums, identity, layers, sum(routing.positions)), routing


def _activation(
    criterion: Any, sums: dict[str, Any], identity: tuple[str, str, str], layers: list[int], positions: int
) -> Activation:
    """All modalities together."""
    with metrics.aggregate(new_root=True) as logged:
        criterion.reduce_metrics([sums])
    return Activation(
        *identity,
        tokens=positions,
        loss=float(logged["nll_loss" if "nll_loss" in logged else "loss"].avg),
        **asdict(expert_counts(sums, layers)),
    )


def modalities_file(folder: Path, split: str) -> Path:
    """Where a split's modalities are kept."""
    return folder / f"modalities-{split}.json"


def write_modalities(path: Path, routing: ModalityRouting) -> None:
    """The counts, and what follows from them, as JSON."""
    write_json(path, {**asdict(routing), "derived": {"overlap": routing.overlap_LGG().tolist()}})


def read_modalities(path: Path) -> ModalityRouting | None:
    """What ``write_modalities`` wrote; None if there is no such file, or it is of another kind."""
    kept = read_json(path) if path.is_file() else {}
    fields = {key: value for key, value in kept.items() if key in ModalityRouting.__dataclass_fields__}
    return ModalityRouting(**fields) if len(fields) == len(ModalityRouting.__dataclass_fields__) else None
