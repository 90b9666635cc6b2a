"""Measure which experts a trained model uses on a split, and which each of its parts, as one record."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ...checkpoints.open import Opened, open_model
from ...common.errors import UserError
from ...evaluation.evaluate import evaluate, split_options
from ...evaluation.expert_loads import LoadCounter
from ...evaluation.records import Metric, Record
from ...tasks.masked_multimodal import MaskedMultimodalTask
from .listening import PositionCounts, listening
from .loads import PartLoads, accuracy, part_guesses

PIECES = 100  # of every part; the guess is made for every second
PIECE_TOKENS = 16


def measure_routing(
    checkpoint: Path,
    data: Path,
    split: str,
    batch_size: int | None,
    kept: Record | None,
    say: Callable[[str], None],
    device: str | None = None,
    precision: str | None = None,
) -> Record:
    """Return the record of a split's routing, what="routing".

    Args:
        checkpoint: a model with experts, of any task that ``mhmoe evaluate`` knows.
        batch_size: blocks, or images, per batch; None for the evaluation's own.
        kept: what ``mhmoe evaluate`` recorded of the same checkpoint, data, split and precision: its loads are not
            counted again.
        device, precision: see ``open_model``.

    Raises:
        UserError: the model has no experts, or the split is none of the data's.
    """
    if kept is not None and kept.what != "masked" and not _has_texts(kept):
        return dataclasses.replace(kept, what="routing")
    opened = open_model(checkpoint, data, device, precision=precision)
    if not any(layer.is_moe_layer for layer in opened.layers):
        raise UserError(f"{checkpoint} is a dense model: it has no experts to measure")
    say(f"measuring the experts of {checkpoint} on {split}")
    _, options = split_options(opened.settings, {"batch_size": batch_size})
    if isinstance(opened.task, MaskedMultimodalTask):
        counts = PositionCounts(opened.model)
        with listening(opened.model, counts.add):
            record = evaluate(opened, split, **options)
        return counts.added_to(record)
    if kept is not None and kept.parts.keys() != opened.task.parts_of(split).keys():
        kept = None  # of some of the languages
    record = evaluate(opened, split, **options) if kept is None else kept
    if _has_texts(record):
        record = _with_guesses(record, opened, split)
    return dataclasses.replace(record, what="routing")


def _has_texts(record: Record) -> bool:
    """Whether a record is of a language model's texts in several languages or domains."""
    return record.what == "perplexity" and bool(record.expert_loads.parts)


def _with_guesses(record: Record, opened: Opened, split: str) -> Record:
    """The record with what the languages or domains share, and how well routing tells them apart."""
    parts = opened.task.parts_of(split)
    guesses = part_guesses([_piece_loads(opened, name) for name in parts.values()])
    metrics = {
        **record.metrics,
        "load in common": Metric(100 * float(np.mean(PartLoads.of(record.expert_loads).mean_overlap())), "%"),
        "part guessed right": Metric(100 * accuracy(guesses[-1]), "%", baselines={"chance": 100 / len(parts)}),
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
            inputs = {name: batch["net_input"][name] for name in ("src_tokens", "domain") if name in batch["net_input"]}
            opened.model(**{name: of[:, :PIECE_TOKENS].to(opened.device) for name, of in inputs.items()})
        assert counter.loads is not None, "a model with experts"
        loads.append([row.loads for row in counter.loads.layers])
    return np.array(loads)
