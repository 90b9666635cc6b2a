"""Perplexity of text, with the function behind ``fairseq-eval-lm``, and of masked patches and words.

Scores are sums, so that those of several parts add up.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..checkpoints.open import Opened
from ..common.errors import UserError
from ..compat import logging_as_found
from ..criterions.masked_multimodal import PARTS, MaskedMultimodalConfig, MaskedMultimodalCriterion, masked_targets
from ..tasks.multilingual_language_modeling import MHMoEMultilingualLanguageModelingTask
from .expert_loads import LoadCounter
from .records import Metric, Record

with logging_as_found():
    from fairseq_cli.eval_lm import eval_lm


class TextScore(NamedTuple):
    """A text's cross entropy.

    Attributes:
        tokens: targets scored.
        bits: the cross entropy of all of them.
        characters: what the tokens stand for; None if unknown.
    """

    tokens: int
    bits: float
    characters: float | None = None

    def metrics(self) -> dict[str, Metric]:
        """Perplexity, bits per token and, comparable across vocabularies, bits per character."""
        loss = self.bits / self.tokens
        found = {
            "perplexity": Metric(2**loss, "perplexity", count=self.tokens),
            "loss": Metric(loss, "bits/token", count=self.tokens),
        }
        if self.characters:
            per_character = self.bits / self.characters
            found["bits/character"] = Metric(per_character, "bits/character", count=round(self.characters))
        return found


def total_of(scores: Iterable[TextScore]) -> TextScore:
    """All texts together; characters only if all are known."""
    tokens, bits, characters = zip(*scores)
    return TextScore(sum(tokens), sum(bits), None if None in characters else sum(characters))


def evaluate_text(
    opened: Opened, split: str, counter: LoadCounter, *, max_tokens: int | None = 36000, batch_size: int | None = 32
) -> Record:
    """Score a split in the blocks of the task, as ``fairseq-eval-lm`` with the same options does.

    Args:
        split: ``valid``, ``test``, or one language's, such as ``test_de``.
        max_tokens: most tokens per batch.
        batch_size: most blocks per batch.

    Raises:
        UserError, FileNotFoundError: for a bad batch size, or as ``task.load_dataset``.
    """
    for flag, value in (("--max-tokens", max_tokens), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{flag} ({value}) must be at least 1")
    names: dict[str | None, str] = {None: split}
    if isinstance(opened.task, MHMoEMultilingualLanguageModelingTask):
        base, languages = opened.task.split_of(split)
        names = {language: f"{base}_{language}" for language in languages}
    scores = {}
    for language, name in names.items():
        with counter.counting(language):
            scores[language] = _score(opened.model, opened.task, name, max_tokens, batch_size)
    total = total_of(scores.values())
    metrics = total.metrics()
    bits_per_byte = opened.identity.bits_per_byte(split, metrics["loss"].value, total.tokens)
    if bits_per_byte is not None:
        metrics["bits/byte"] = Metric(bits_per_byte, "bits/byte", count=total.tokens)
    parts = {language: score.metrics() for language, score in scores.items() if language is not None}
    return Record("perplexity", split, metrics, parts)


def _score(model: Any, task: Any, split: str, max_tokens: int | None, batch_size: int | None) -> TextScore:
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
        for batch in batches:
            if batch:
                counts.append(int(batch["ntokens"]) - (int(batch["nsentences"]) if has_bos else 0))
            yield batch

    found = eval_lm(
        [model], task.source_dictionary, counted(), target_dictionary=task.target_dictionary, remove_bos_token=has_bos
    )
    tokens = sum(counts)  # fairseq tells only those that it scored per second
    characters = getattr(dataset, "characters", {})
    total = sum(characters.values()) if characters and tokens == dataset.sizes.sum() else None
    return TextScore(tokens, float(found["loss"]) * tokens, total)


class PartScore(NamedTuple):
    """How masked positions of one kind were predicted.

    Attributes:
        targets: masked positions.
        bits: the cross entropy of all of them.
        correct: those whose most probable symbol is the right one.
    """

    targets: int
    bits: float
    correct: float

    def metrics(self, guess: "PartScore") -> dict[str, Metric]:
        """Perplexity, loss and accuracy beside what a guess without context reaches."""
        own, other = (
            (2 ** (score.bits / score.targets), score.bits / score.targets, 100 * score.correct / score.targets)
            for score in (self, guess)
        )
        columns = zip(("perplexity", "loss", "accuracy"), ("perplexity", "bits/position", "%"), own, other)
        return {
            name: Metric(value, unit, count=self.targets, baselines={"without context": guessed})
            for name, unit, value, guessed in columns
        }


def together(parts: Iterable[PartScore]) -> PartScore:
    """All positions of several parts."""
    return PartScore(*map(sum, zip(*parts)))


def guess(counts: Sequence[int]) -> PartScore:
    """The best guess of symbols that come this often in the very split, without any context.

    A model that learns from what is not masked beats it.
    """
    total = sum(counts)
    return PartScore(total, -sum(count * math.log2(count / total) for count in counts), max(counts))


def part_scores(sums: Mapping[str, float]) -> dict[str, PartScore]:
    """The parts with masked positions, from a criterion's logs added up."""
    return {
        part: PartScore(int(targets), sums[f"{part}_loss"] / math.log(2), sums[f"{part}_correct"])
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
    guesses = {part: guess(list(symbols[part].values())) for part in scores}
    parts = {name: score.metrics(guesses[name]) for name, score in scores.items()}
    metrics = together(scores.values()).metrics(together(guesses.values()))
    return Record("masked", split, metrics, parts, data=task.state_dict())  # which visual tokenizer's ids it predicts
