"""Perplexity of a split, language by language, with the function behind ``fairseq-eval-lm``."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..checkpoints.open import Opened
from ..common.errors import UserError
from ..compat import logging_as_found
from ..tasks.multilingual_language_modeling import MHMoEMultilingualLanguageModelingTask
from .expert_loads import LoadCounter
from .records import Metric, Record

with logging_as_found():
    from fairseq_cli.eval_lm import eval_lm


@dataclass(frozen=True)
class TextScore:
    """A text's cross entropy.

    Attributes:
        tokens: targets scored.
        loss: bits per token.
        characters: what the tokens stand for; None if unknown.
    """

    tokens: int
    loss: float
    characters: float | None = None

    @property
    def bits_per_character(self) -> float | None:
        """Comparable across vocabularies; None if the characters are unknown."""
        return self.loss * self.tokens / self.characters if self.characters else None

    def metrics(self) -> dict[str, Metric]:
        """What a record holds of it."""
        found = {
            "perplexity": Metric(2**self.loss, "perplexity", count=self.tokens),
            "loss": Metric(self.loss, "bits/token", count=self.tokens),
        }
        if self.characters:
            found["bits/character"] = Metric(self.bits_per_character, "bits/character", count=round(self.characters))
        return found


def total_of(scores: Sequence[TextScore]) -> TextScore:
    """All texts together, weighted by their tokens; characters only if all are known."""
    tokens = sum(score.tokens for score in scores)
    characters = [score.characters for score in scores if score.characters is not None]
    return TextScore(
        tokens=tokens,
        loss=sum(score.loss * score.tokens for score in scores) / tokens,
        characters=sum(characters) if len(characters) == len(scores) else None,
    )


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
    total = total_of(list(scores.values()))
    metrics = total.metrics()
    bits_per_byte = opened.identity.bits_per_byte(split, total.loss, total.tokens)
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
    batches = _Counted(
        task.eval_lm_dataloader(
            dataset, max_tokens, batch_size, max_positions=model.max_positions(), num_workers=0, data_buffer_size=0
        ),
        has_bos,
    )
    found = eval_lm(
        [model], task.source_dictionary, batches, target_dictionary=task.target_dictionary, remove_bos_token=has_bos
    )
    characters = getattr(dataset, "characters", {})
    complete = batches.tokens == dataset.sizes.sum()
    total = sum(characters.values()) if characters and complete else None
    return TextScore(batches.tokens, float(found["loss"]), total)


class _Counted:
    """Batches that count their targets; fairseq tells only those that it scored per second."""

    def __init__(self, batches: Iterable[dict[str, Any]], has_bos: bool) -> None:
        self.batches = batches
        self.has_bos = has_bos
        self.tokens = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.batches:
            if batch:
                self.tokens += int(batch["ntokens"]) - (int(batch["nsentences"]) if self.has_bos else 0)
            yield batch
