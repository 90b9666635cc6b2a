"""Loss, perplexity and bits per character of a split and its languages, and the JSON file that keeps them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..common.files import read_json, write_json


@dataclass(frozen=True)
class Score:
    """Of a text.

    Attributes:
        tokens: targets scored.
        loss: bits per token.
        characters: what the tokens stand for; None if unknown.
    """

    tokens: int
    loss: float
    characters: float | None = None

    @property
    def perplexity(self) -> float:
        """Per token."""
        return 2**self.loss

    @property
    def bits_per_character(self) -> float | None:
        """Comparable across vocabularies; None if the characters are unknown."""
        return self.loss * self.tokens / self.characters if self.characters else None


@dataclass(frozen=True)
class SplitScores:
    """A split's languages, none if it is one text, and the whole: the languages weighted by their tokens."""

    languages: dict[str, Score]
    total: Score


def total_of(scores: list[Score]) -> Score:
    """Of all texts together; characters only if all are known."""
    tokens = sum(score.tokens for score in scores)
    characters = [score.characters for score in scores if score.characters is not None]
    return Score(
        tokens=tokens,
        loss=sum(score.loss * score.tokens for score in scores) / tokens,
        characters=sum(characters) if len(characters) == len(scores) else None,
    )


def write_scores(path: Path, scores: SplitScores, provenance: dict[str, Any]) -> None:
    """Write the figures, and what they belong to: ``checkpoint`` (the file's name) and ``data_digest`` among others."""
    languages = {language: _figures(score) for language, score in scores.languages.items()}
    write_json(path, {**provenance, "languages": languages, "total": _figures(scores.total)})


def read_scores(path: Path) -> tuple[SplitScores, dict[str, Any]]:
    """What ``write_scores`` wrote: the figures and what they belong to.

    Raises:
        UserError: if it is another file.
    """
    kept = read_json(path)
    try:
        languages = {language: _score(figures) for language, figures in kept.pop("languages").items()}
        scores = SplitScores(languages, _score(kept.pop("total")))
        kept["checkpoint"], kept["data_digest"]
        return scores, kept
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no output of mhmoe evaluate: {error!r} is missing or malformed") from error


def _figures(score: Score) -> dict[str, float | None]:
    return {
        "tokens": score.tokens,
        "loss": score.loss,
        "perplexity": score.perplexity,
        "characters": score.characters,
        "bits_per_character": score.bits_per_character,
    }


def _score(figures: dict[str, Any]) -> Score:
    return Score(figures["tokens"], figures["loss"], figures["characters"])
