"""Perplexity and accuracy of masked patches and masked words on a split."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoints.open import Opened
from ..criterions.masked_multimodal import PARTS, MaskedMultimodalConfig, MaskedMultimodalCriterion, masked_targets
from .expert_loads import LoadCounter
from .records import Metric, Record


@dataclass(frozen=True)
class PartScore:
    """How masked positions of one kind were predicted.

    Attributes:
        targets: masked positions.
        loss: bits for each of them.
        accuracy: share of them whose most probable symbol is the right one.
    """

    targets: int
    loss: float
    accuracy: float

    def metrics(self, guess: "PartScore") -> dict[str, Metric]:
        """What a record holds of it, beside what a guess without context reaches."""
        values = (
            ("perplexity", "perplexity", lambda part: 2**part.loss),
            ("loss", "bits/position", lambda part: part.loss),
            ("accuracy", "%", lambda part: 100 * part.accuracy),
        )
        return {
            name: Metric(value(self), unit, count=self.targets, baselines={"without context": value(guess)})
            for name, unit, value in values
        }


def together(parts: Sequence[PartScore]) -> PartScore:
    """All positions of several parts."""
    targets = sum(part.targets for part in parts)
    return PartScore(
        targets,
        sum(part.loss * part.targets for part in parts) / targets,
        sum(part.accuracy * part.targets for part in parts) / targets,
    )


def guess(counts: Sequence[int]) -> PartScore:
    """The best guess of symbols that come this often in the very split, without any context.

    A model that learns from what is not masked beats it.
    """
    total = sum(counts)
    return PartScore(total, -sum(count * math.log2(count / total) for count in counts) / total, max(counts) / total)


@torch.no_grad()
def evaluate_masked(opened: Opened, split: str, counter: LoadCounter, *, batch_size: int = 32) -> Record:
    """Score a split as a validation in training does; every example once, with the split's own masks.

    Args:
        batch_size: most examples of each modality per batch.

    Raises:
        UserError, FileNotFoundError: for a bad batch size, or as ``task.load_dataset``.
    """
    task, model = opened.task, opened.model
    task.load_dataset(split)
    criterion = MaskedMultimodalCriterion(task, MaskedMultimodalConfig()).eval()
    sums: dict[str, float] = {}
    symbols: dict[str, Counter[int]] = {part: Counter() for part in PARTS}

    def name_modality(module: Any, args: Any, inputs: dict[str, Any]) -> None:
        given = [name for name, key in (("image", "images"), ("text", "text_tokens")) if inputs.get(key) is not None]
        counter.part = "pair" if len(given) == 2 else given[0]

    naming = model.register_forward_pre_hook(name_modality, with_kwargs=True)
    with counter.counting():
        for batch in opened.batches(task.dataset(split), batch_size):
            for key, value in task.valid_step(batch, model, criterion)[2].items():
                if key.rpartition("_")[0] in PARTS:
                    sums[key] = sums.get(key, 0.0) + float(value)
            for modality in task.modalities:
                for part, (_, targets) in masked_targets(task, modality, batch[modality]).items():
                    symbols[part].update(targets.tolist())
    naming.remove()
    scores = part_scores(sums)
    guesses = {part: guess(list(symbols[part].values())) for part in scores}
    parts = {name: score.metrics(guesses[name]) for name, score in scores.items()}
    metrics = together(list(scores.values())).metrics(together(list(guesses.values())))
    return Record("masked", split, metrics, parts, data=task.state_dict())  # which visual tokenizer's ids it predicts


def part_scores(sums: dict[str, float]) -> dict[str, PartScore]:
    """The parts with masked positions, from a criterion's logs added up."""
    found = {}
    for part in PARTS:
        targets = int(sums.get(f"{part}_targets", 0))
        if targets:
            bits, correct = float(sums[f"{part}_loss"]) / math.log(2), float(sums[f"{part}_correct"])
            found[part] = PartScore(targets, bits / targets, correct / targets)
    return found
