"""Measure which experts a trained model uses on a split, and which each language or modality, as one record."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from ...checkpoints.open import Opened, open_model
from ...common.errors import UserError
from ...evaluation.evaluate import evaluate, split_options
from ...evaluation.expert_loads import LoadCounter
from ...evaluation.records import LayerLoads, Metric, Record
from ...tasks.masked_multimodal import MaskedMultimodalTask
from .listening import IMAGE, TEXT, RoutedCall, distinct_experts, listening, most_distinct, num_experts, pools_of
from .loads import PartLoads, accuracy, language_guesses

PIECES = 100  # of every language; the guess is made for every second
PIECE_TOKENS = 16
# What positions are told apart in a model of images and text, in the order of tables.
GROUPS = ("image", "text", "image of pairs", "text of pairs")


def measure_routing(
    checkpoint: Path,
    data: Path,
    split: str,
    batch_size: int | None = None,
    kept: Record | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Record:
    """Return the record of a split's routing, what="routing".

    Args:
        checkpoint: a model with experts, of any task that ``mhmoe evaluate`` knows.
        data: the prepared folder.
        split: such as ``valid``.
        batch_size: blocks, or images, per batch; None for the evaluation's own.
        kept: what ``mhmoe evaluate`` recorded of the same checkpoint, data and split: its loads are not counted again.
        say: is told what is measured.

    Raises:
        UserError: the model has no experts, or the split is none of the data's.
    """
    if kept is not None and kept.what != "masked" and not _is_by_language(kept):
        return dataclasses.replace(kept, what="routing")
    opened = open_model(checkpoint, data)
    if not any(layer.is_moe_layer for layer in opened.layers):
        raise UserError(f"{checkpoint} is a dense model: it has no experts to measure")
    say(f"measuring the experts of {checkpoint} on {split}")
    _, options = split_options(opened.settings, {"batch_size": batch_size})
    if isinstance(opened.task, MaskedMultimodalTask):
        counts = PositionCounts(opened.model)
        with listening(opened.model, counts.add):
            record = evaluate(opened, split, **options)
        return counts.added_to(record)
    record = evaluate(opened, split, **options) if kept is None else kept
    if _is_by_language(record):
        record = _with_guesses(record, opened, split)
    return dataclasses.replace(record, what="routing")


def _is_by_language(record: Record) -> bool:
    """Whether a record is of a language model's texts in several languages."""
    return record.what == "perplexity" and bool(record.experts.parts)


def _with_guesses(record: Record, opened: Opened, split: str) -> Record:
    """The record with what the languages share, and how well routing tells them apart."""
    base, languages = opened.task.split_of(split)
    guesses = language_guesses([_piece_loads(opened, f"{base}_{language}") for language in languages])
    metrics = {
        **record.metrics,
        "load in common": Metric(100 * float(np.mean(PartLoads.of(record.experts).mean_overlap())), "%"),
        "language guessed right": Metric(100 * accuracy(guesses[-1]), "%", baselines={"chance": 100 / len(languages)}),
    }
    settings = {"guesses": guesses.tolist(), "piece_tokens": PIECE_TOKENS}
    return dataclasses.replace(record, metrics=metrics, settings={**record.settings, **settings})


@torch.no_grad()
def _piece_loads(opened: Opened, split: str) -> np.ndarray:
    """Assignments of the first tokens of blocks spread over a split, ``(P, L, E)``: a causal model routes them so."""
    opened.task.load_dataset(split)
    dataset = opened.task.dataset(split)
    loads = []
    for index in np.unique(np.linspace(0, len(dataset) - 1, PIECES).astype(int)):
        batch = dataset.collater([dataset[index]])
        counter = LoadCounter(opened.layers)
        with counter.counting():
            opened.model(batch["net_input"]["src_tokens"][:, :PIECE_TOKENS].to(opened.device))
        loads.append([row.loads for row in counter.loads.layers])
    return np.array(loads)


class PositionCounts:
    """Expert loads of the positions of images and of texts, alone and in pairs.

    Args:
        model: ``MHMoEBEiT3`` with MoE layers.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._loads: dict[str, dict[int, torch.Tensor]] = {}
        self._distinct: dict[str, dict[int, int]] = {}
        self._positions = dict.fromkeys(GROUPS, 0)

    def add(self, call: RoutedCall) -> None:
        """Count one call's positions; of padding, and of calls that only keep other processes company, none."""
        for group, selected in group_positions(call):
            self._positions[group] += int(selected.sum())
            for layer, choices in call.choices.items():
                experts = num_experts(self._model, layer)
                chosen = choices[selected].cpu()
                load_E = torch.bincount(chosen.flatten(), minlength=experts)
                loads, distinct = self._loads.setdefault(group, {}), self._distinct.setdefault(group, {})
                loads[layer] = loads.get(layer, 0) + load_E
                distinct[layer] = distinct.get(layer, 0) + int(distinct_experts(chosen, experts).sum())

    def added_to(self, record: Record) -> Record:
        """The record of an evaluation as one of routing, with the groups that have positions as its parts."""
        groups = [group for group in GROUPS if self._positions[group]]
        spread = {
            group: [count / self._positions[group] for count in self._distinct[group].values()] for group in groups
        }
        parts = {
            group: {"experts per position": Metric(float(np.mean(means)), "experts", count=self._positions[group])}
            for group, means in spread.items()
        }
        rows = [
            row
            for group in groups
            for layer, load_E in self._loads[group].items()
            for row in self._rows(group, layer, load_E)
        ]
        return dataclasses.replace(
            record,
            what="routing",
            parts=parts,
            experts=dataclasses.replace(record.experts, layers=[*record.experts.of(None).layers, *rows]),
            settings={**record.settings, "experts_per_position": spread, "most_experts": most_distinct(self._model)},
        )

    def _rows(self, group: str, layer: int, load_E: torch.Tensor) -> Iterator[LayerLoads]:
        """The loads of a group in one layer, a row for each pool of its experts that the group uses."""
        pools = pools_of(self._model, layer)
        names = (None,) if len(pools) == 1 else (IMAGE, TEXT)
        for name, load in zip(names, load_E.split([pool.config.num_experts for pool in pools])):
            if load.any():
                yield LayerLoads(layer, load.tolist(), group, name)


def group_positions(call: RoutedCall) -> Iterator[tuple[str, torch.Tensor]]:
    """The groups of a call, and bool ``(B, L)`` which positions belong to each."""
    is_image = torch.arange(call.is_real.size(1), device=call.is_real.device) < call.image_positions
    if call.modality in (IMAGE, TEXT):
        yield call.modality, call.is_real
    else:
        yield "image of pairs", call.is_real & is_image
        yield "text of pairs", call.is_real & ~is_image
