"""Perplexity of text, with the function behind ``fairseq-eval-lm``, and of masked patches and words."""

import contextlib
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from ..checkpoints.open import Opened
from ..common.errors import UserError
from ..common.timing import tracked
from ..compat import logging_as_found
from ..criterions.masked_multimodal import PARTS, MaskedMultimodalConfig, MaskedMultimodalCriterion, masked_targets
from .domain_mixture import DomainMixture, score_batches
from .expert_loads import LoadCounter
from .records import Metric, Record

with logging_as_found():
    from fairseq_cli.eval_lm import eval_lm


class Score(NamedTuple):
    """How targets of one kind were predicted; sums, so that those of several parts add up.

    Attributes:
        targets: tokens of text, or masked positions.
        bits: the cross entropy of all of them.
        correct: those whose most probable symbol is the right one; None if not counted.
        characters, bytes: what the targets stand for; None if unknown.
    """

    targets: int
    bits: float
    correct: float | None = None
    characters: float | None = None
    bytes: int | None = None

    def metrics(self, target: str, guess: "Score | None" = None) -> dict[str, Metric]:
        """What a record holds of it.

        Args:
            target: what a target is, for the unit of the loss.
            guess: what a guess without context reaches.
        """
        loss = self.bits / self.targets
        values = {
            "perplexity": (2**loss if loss < sys.float_info.max_exp else math.inf, "perplexity"),
            "loss": (loss, f"bits/{target}"),
        }
        if self.correct is not None:
            values["accuracy"] = 100 * self.correct / self.targets, "%"
        found = {name: Metric(value, unit, count=self.targets) for name, (value, unit) in values.items()}
        for unit, size in (("bits/character", self.characters), ("bits/byte", self.bytes)):
            if size:  # comparable across vocabularies
                found[unit] = Metric(self.bits / size, unit, count=round(size))
        if guess is not None:
            for name, other in guess.metrics(target).items():
                found[name].baselines["without context"] = other.value
        return found


def together(scores: Iterable[Score]) -> Score:
    """All targets of several parts; what is unknown of one is unknown of all."""
    return Score._make(None if None in column else sum(column) for column in zip(*scores))


def evaluate_text(
    opened: Opened, split: str, counter: LoadCounter, *, max_tokens: int | None = 36000, batch_size: int | None = 32,
    domain_mixture: str | None = None, domain_prior: str | None = None,
) -> Record:  # fmt: skip
    """Score a split in the blocks of the task, as ``fairseq-eval-lm`` with the same options does.

    Args:
        split: ``valid``, ``test``, or one language's, such as ``test_de``.
        max_tokens, batch_size: most tokens and blocks per batch.
        domain_mixture: of a model with experts of domains, how they are mixed where the text's domain is not told; see
            ``DomainMixture``, and from which prior; then every expert reads everything, and no loads are counted.

    Raises:
        UserError, FileNotFoundError: for a block that is longer than a batch, or as ``task.load_dataset``.
    """
    if domain_prior is not None and domain_mixture is None:
        raise UserError(f"--domain-prior ({domain_prior}): needs --domain-mixture")
    mixture = None if domain_mixture is None else DomainMixture(opened.task, domain_mixture, domain_prior)
    scores = {}
    for part, name in (opened.task.parts_of(split) or {None: split}).items():
        with counter.counting(part) if mixture is None else contextlib.nullcontext():
            score = _score(opened.model, opened.task, name, max_tokens, batch_size, mixture)
        scores[part] = score._replace(bytes=opened.identity.bytes_of(name, score.targets))
    parts = {part: score.metrics("token") for part, score in scores.items() if part is not None}
    what, settings = ("perplexity", {}) if mixture is None else (mixture.kind, mixture.settings)
    return Record(what, split, together(scores.values()).metrics("token"), parts, settings=settings)


def _score(
    model: Any, task: Any, split: str, max_tokens: int | None, batch_size: int | None, mixture: DomainMixture | None
) -> Score:
    task.load_dataset(split)
    dataset = task.dataset(split)
    longest = int(max(dataset.sizes, default=0))
    if max_tokens is not None and max_tokens < longest:
        raise UserError(f"--max-tokens ({max_tokens}) must be at least {longest}, the longest block of {split}")
    has_bos = bool(getattr(task.args, "add_bos_token", False))
    batches = task.eval_lm_dataloader(
        dataset, max_tokens, batch_size, max_positions=model.max_positions(), num_workers=0, data_buffer_size=0
    )
    counts: list[int] = []

    def counted() -> Iterator[dict[str, Any]]:
        for batch in tracked(batches, f"evaluate {split}", "batches"):
            if batch:
                counts.append(int(batch["ntokens"]) - (int(batch["nsentences"]) if has_bos else 0))
            yield batch

    if mixture is None:
        found = eval_lm(
            [model], task.source_dictionary, counted(), target_dictionary=task.target_dictionary,
            remove_bos_token=has_bos,
        )  # fmt: skip
        tokens = sum(counts)  # fairseq tells only those that it scored per second
        bits = float(found["loss"]) * tokens
    else:
        bits = score_batches(mixture, model, counted(), has_bos)
        tokens = sum(counts)
    characters = getattr(dataset, "characters", {})
    total = sum(characters.values()) if characters and tokens == dataset.sizes.sum() else None
    return Score(tokens, bits, characters=total)


def guess(counts: Collection[int]) -> Score:
    """The best guess of symbols that come this often in the very split, without any context.

    A model that learns from what is not masked beats it.
    """
    total = sum(counts)
    return Score(total, -sum(count * math.log2(count / total) for count in counts), max(counts))


def part_scores(sums: Mapping[str, float]) -> dict[str, Score]:
    """The parts with masked positions, from a criterion's logs added up."""
    return {
        part: Score(int(targets), sums[f"{part}_loss"] / math.log(2), sums[f"{part}_correct"])
        for part in PARTS
        if (targets := sums.get(f"{part}_targets", 0))
    }


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
    sums: defaultdict[str, float] = defaultdict(float)
    symbols: dict[str, Counter[int]] = {part: Counter() for part in PARTS}

    def name_modality(module: Any, args: Any, inputs: dict[str, Any]) -> None:
        given = [name for name, key in (("image", "images"), ("text", "text_tokens")) if inputs.get(key) is not None]
        counter.part = "pair" if len(given) == 2 else given[0]

    naming = model.register_forward_pre_hook(name_modality, with_kwargs=True)
    with counter.counting():
        for batch in opened.batches(task.dataset(split), batch_size):
            for key, value in task.valid_step(batch, model, criterion)[2].items():
                if key.rpartition("_")[0] in PARTS:
                    sums[key] += float(value)
            for modality in task.modalities:
                for part, (_, targets) in masked_targets(task, modality, batch[modality]).items():
                    symbols[part].update(targets.tolist())
    naming.remove()
    scores = part_scores(sums)
    guesses = {part: guess(symbols[part].values()) for part in scores}
    parts = {name: score.metrics("position", guesses[name]) for name, score in scores.items()}
    metrics = together(scores.values()).metrics("position", together(guesses.values()))
    return Record("masked", split, metrics, parts, data=task.state_dict())  # which visual tokenizer's ids it predicts
