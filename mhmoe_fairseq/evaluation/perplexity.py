"""Perplexity of a split, language by language, with the function behind ``fairseq-eval-lm``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from fairseq.tasks import FairseqTask

from ..common.errors import UserError
from ..compat import logging_as_found
from ..tasks.multilingual_language_modeling import MHMoEMultilingualLanguageModelingTask
from .split_scores import Score, SplitScores, total_of

with logging_as_found():
    from fairseq_cli.eval_lm import eval_lm


def score_split(
    model: torch.nn.Module, task: FairseqTask, split: str, max_tokens: int | None, batch_size: int | None
) -> SplitScores:
    """Score a split in the blocks of the task, as ``fairseq-eval-lm`` with the same options does.

    Raises:
        ValueError, OSError: as ``task.load_dataset``.
    """
    for flag, value in (("--max-tokens", max_tokens), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{flag} ({value}) must be at least 1")
    if not isinstance(task, MHMoEMultilingualLanguageModelingTask):
        return SplitScores({}, _score(model, task, split, max_tokens, batch_size))
    base, languages = task.split_of(split)
    scores = {language: _score(model, task, f"{base}_{language}", max_tokens, batch_size) for language in languages}
    return SplitScores(scores, total_of(list(scores.values())))


def _score(model: torch.nn.Module, task: Any, split: str, max_tokens: int | None, batch_size: int | None) -> Score:
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
    return Score(batches.tokens, float(found["loss"]), sum(characters.values()) if characters and complete else None)


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
