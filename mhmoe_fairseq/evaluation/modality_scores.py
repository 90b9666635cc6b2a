"""Perplexity and accuracy of masked patches and words on a split, and the JSON file that keeps them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq import utils
from fairseq.tasks import FairseqTask

from ..common.errors import UserError
from ..common.files import read_json, write_json
from ..criterions.masked_multimodal import PARTS, MaskedMultimodalConfig, MaskedMultimodalCriterion, masked_targets


@dataclass(frozen=True)
class PartScore:
    """Of one kind of masked positions.

    Attributes:
        targets: masked positions.
        loss: bits for each of them.
        accuracy: share of them whose most probable symbol is the right one.
    """

    targets: int
    loss: float
    accuracy: float

    @property
    def perplexity(self) -> float:
        """Per masked position."""
        return 2**self.loss


@dataclass(frozen=True)
class ExpertCounts:
    """How a split was routed; all modalities together.

    Attributes:
        layers: of every row below, the MoE layer's place in the encoder, from 0. A layer with a pool of experts for
            each modality has a row for each, the images' first; a pool that nothing was routed to has none.
        load: per row and expert, assignments (sub-token, choice) before dropping.
        dropped: per row, assignments dropped for lack of capacity.
        entropy: per row, the router's mean softmax entropy in nats.
    """

    layers: list[int]
    load: list[list[float]]
    dropped: list[float]
    entropy: list[float]


@dataclass(frozen=True)
class ModalityScores:
    """Of a split.

    Attributes:
        parts: those of ``PARTS`` that the model was trained on.
        without_context: the same parts, by a guess that sees nothing but knows how often every symbol is masked in
            this very split: a baseline that a model which learns from what is not masked beats.
        experts: None of a dense model.
    """

    parts: dict[str, PartScore]
    without_context: dict[str, PartScore]
    experts: ExpertCounts | None = None

    @property
    def total(self) -> PartScore:
        """All masked positions together."""
        return together(list(self.parts.values()))


def together(parts: list[PartScore]) -> PartScore:
    """All positions of several parts."""
    targets = sum(part.targets for part in parts)
    return PartScore(
        targets,
        sum(part.loss * part.targets for part in parts) / targets,
        sum(part.accuracy * part.targets for part in parts) / targets,
    )


@torch.no_grad()
def score_modalities(model: torch.nn.Module, task: FairseqTask, split: str, batch_size: int) -> ModalityScores:
    """Score a split as a validation in training does; every sample once, with the split's own masks.

    Raises:
        ValueError, OSError: for a bad batch size, or as ``task.load_dataset``.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size ({batch_size}) must be at least 1")
    task.load_dataset(split)
    batches = task.get_batch_iterator(
        task.dataset(split), max_sentences=batch_size, required_batch_size_multiple=1
    ).next_epoch_itr(shuffle=False)
    criterion = MaskedMultimodalCriterion(task, MaskedMultimodalConfig()).eval()
    on_gpu = next(model.parameters()).is_cuda
    sums: dict[str, Any] = {}
    symbols: dict[str, Counter[int]] = {part: Counter() for part in PARTS}
    for batch in batches:
        batch = utils.move_to_cuda(batch) if on_gpu else batch
        for key, value in task.valid_step(batch, model.eval(), criterion)[2].items():
            sums[key] = sums.get(key, 0) + (value.double().cpu() if torch.is_tensor(value) else value)
        for modality in task.modalities:
            for part, (_, targets) in masked_targets(task, modality, batch[modality]).items():
                symbols[part].update(targets.tolist())
    layers = [place for place, layer in enumerate(model.beit3.encoder.layers) if layer.is_moe_layer]
    guesses = {part: guess(list(counts.values())) for part, counts in symbols.items() if counts}
    return ModalityScores(_parts(sums), guesses, expert_counts(sums, layers) if layers else None)


def guess(counts: list[int]) -> PartScore:
    """The best guess of symbols that come this often, without any context."""
    total = sum(counts)
    return PartScore(total, -sum(count * math.log2(count / total) for count in counts) / total, max(counts) / total)


def _parts(sums: dict[str, Any]) -> dict[str, PartScore]:
    found = {}
    for part in PARTS:
        targets = int(sums.get(f"{part}_targets", 0))
        if targets:
            bits, correct = float(sums[f"{part}_loss"]) / math.log(2), float(sums[f"{part}_correct"])
            found[part] = PartScore(targets, bits / targets, correct / targets)
    return found


def expert_counts(sums: dict[str, Any], layers: list[int]) -> ExpertCounts:
    """From a criterion's logs, added up.

    Args:
        layers: the MoE layers' places.
    """
    load, dropped = sums["moe_load"], sums["moe_dropped"]
    entropy = sums["moe_entropy_sum"] / sums["moe_subtokens"].clamp(min=1)
    pools = load.size(0) // len(layers)
    used = load.any(1).nonzero().flatten()
    places = [layers[row // pools] for row in used.tolist()]
    return ExpertCounts(places, load[used].tolist(), dropped[used].tolist(), entropy[used].tolist())


def write_modality_scores(path: Path, scores: ModalityScores, provenance: dict[str, Any]) -> None:
    """Write the figures, and what they belong to: ``checkpoint`` (the file's name) and ``data_digest`` among others."""
    figures = {
        "modalities": {name: _figures(part) for name, part in scores.parts.items()},
        "total": _figures(scores.total),
        "without_context": {name: _figures(part) for name, part in scores.without_context.items()},
        "experts": None if scores.experts is None else asdict(scores.experts),
    }
    write_json(path, {**provenance, **figures})


def read_modality_scores(path: Path) -> tuple[ModalityScores, dict[str, Any]]:
    """What ``write_modality_scores`` wrote: the figures and what they belong to.

    Raises:
        UserError: if it is another file.
    """
    kept = read_json(path)
    try:
        parts, guesses = (
            {name: _score(figures) for name, figures in kept.pop(key).items()}
            for key in ("modalities", "without_context")
        )
        experts = kept.pop("experts")
        kept.pop("total")
        kept["checkpoint"], kept["data_digest"]
        return ModalityScores(parts, guesses, None if experts is None else ExpertCounts(**experts)), kept
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no output of mhmoe evaluate on images and text: {error!r}") from error


def _figures(part: PartScore) -> dict[str, float]:
    return {**asdict(part), "perplexity": part.perplexity}


def _score(figures: dict[str, float]) -> PartScore:
    return PartScore(int(figures["targets"]), figures["loss"], figures["accuracy"])
