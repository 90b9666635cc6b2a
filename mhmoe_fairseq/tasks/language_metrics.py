"""Perplexity and bits per character of every language in one validation, through fairseq's metrics."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from fairseq import utils
from fairseq.logging import metrics
from torch import Tensor

_PRIORITY = 700  # behind what a validation logs without languages


def language_sums(sample: dict[str, Any], losses: Tensor, num_languages: int, pad: int) -> dict[str, Tensor]:
    """Additive sums for every language, ``(num_languages,)`` each.

    Args:
        sample: a batch with ``target``, ``(B, S)``, ``languages``, ``(B,)``, and perhaps ``characters``, ``(B,)``.
        losses: cross entropy of every target in nats, 0 where padded; B * S values.
    """
    target, languages = sample["target"], sample["languages"]
    rows = len(languages)  # --pad-to-fixed-bsz adds rows of padding behind them
    by_row = {
        "language_loss": losses.detach().view(target.shape)[:rows].sum(1, dtype=torch.float64),
        "language_tokens": target[:rows].ne(pad).sum(1).double(),
    }
    if "characters" in sample:
        by_row["language_characters"] = sample["characters"].double()
    zeros = by_row["language_loss"].new_zeros(num_languages)
    return {key: zeros.index_add(0, languages, values) for key, values in by_row.items()}


def log_languages(languages: list[str], logging_outputs: list[dict[str, Any]]) -> None:
    """Log ``ppl_de`` and, where characters are known, ``bpc_de`` of every language, and ``bpc`` of all together."""
    if not any("language_loss" in log for log in logging_outputs):
        return
    # Hidden meters (leading underscore) add the sums up; figures come from the sums of the whole set.
    for key in ("language_loss", "language_tokens", "language_characters"):
        if any(key in log for log in logging_outputs):
            metrics.log_scalar(f"_{key}", sum(log[key] for log in logging_outputs if key in log), weight=1)
    tokens = sum(log["language_tokens"] for log in logging_outputs if "language_tokens" in log)
    has_characters = any("language_characters" in log for log in logging_outputs)
    for number, language in enumerate(languages):
        if tokens[number] > 0:
            metrics.log_derived(f"ppl_{language}", functools.partial(_perplexity, number), _PRIORITY)
            if has_characters:
                metrics.log_derived(f"bpc_{language}", functools.partial(_bits_per_character, [number]), _PRIORITY)
    if has_characters:
        metrics.log_derived("bpc", functools.partial(_bits_per_character, range(len(languages))), _PRIORITY)


def _perplexity(language: int, meters: Any) -> float:
    nats, tokens = (float(meters[f"_language_{key}"].sum[language]) for key in ("loss", "tokens"))
    return utils.get_perplexity(nats / tokens / math.log(2))


def _bits_per_character(languages: range | list[int], meters: Any) -> float:
    nats, characters = (
        sum(float(meters[f"_language_{key}"].sum[language]) for language in languages) for key in ("loss", "characters")
    )
    return round(nats / characters / math.log(2), 4)
