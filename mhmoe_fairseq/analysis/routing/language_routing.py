"""Which experts each language uses, and whether the routing of a few tokens tells their language."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...common.console import say
from ...common.files import read_json, sha256_of, write_json
from ...tasks.multilingual_language_modeling import MHMoEMultilingualLanguageModelingTask
from .activation import Activation, count_split, load_moe_model, read_activation, write_activation
from .group_loads import GroupLoads
from .language_statistics import accuracy, language_guesses, mean_overlap
from .routing_counts import RoutingCounts, count_routing

PIECES = 100  # of every language; the guess is made for every second
PIECE_TOKENS = 16


@dataclass(frozen=True)
class LanguageRouting(GroupLoads):
    """Counts of one model over the languages of one split.

    Attributes:
        checkpoint_sha256, data_digest, split, layers: as in ``Activation``.
        languages: codes, in the order of what follows.
        tokens: targets of each language.
        loss: bits per token of each.
        load: per language, layer and expert, assignments before dropping.
        guesses: per layer, and last for all layers together, the matrix of ``language_guesses`` on the first
            ``piece_tokens`` tokens of some blocks.
        piece_tokens: tokens of a piece.
    """

    checkpoint_sha256: str
    data_digest: str
    split: str
    layers: list[int]
    languages: list[str]
    tokens: list[int]
    loss: list[float]
    load: list[list[list[float]]]
    guesses: list[list[list[int]]]
    piece_tokens: int

    def mean_overlap(self) -> list[float]:
        """Per layer, the mean over pairs of different languages."""
        return [mean_overlap(layer) for layer in self.overlap_LGG()]

    def accuracy(self) -> list[float]:
        """Per layer, and last for all together, the share of pieces whose language is guessed right."""
        return [accuracy(torch.tensor(guesses)) for guesses in self.guesses]


def is_multilingual(settings: dict[str, dict[str, Any]]) -> bool:
    """Whether a checkpoint's stored configuration is of the task of several languages."""
    return "langs" in settings["task"]


def measured_languages(
    folder: Path, checkpoint: Path, data: Path, split: str, data_digest: str, batch_size: int = 32
) -> tuple[Activation, LanguageRouting]:
    """The routing of a split and of its languages, kept in ``activation-SPLIT.json`` and ``languages-SPLIT.json``.

    Files that are of the same checkpoint and data are read in place of measuring again.

    Raises:
        ValueError, OSError: as ``measure_activation``.
    """
    activation, languages = (
        read_activation(activation_file(folder, split)),
        read_languages(languages_file(folder, split)),
    )
    identity = (sha256_of(checkpoint), data_digest, split)
    if activation and languages and activation.identity == languages.identity == identity:
        return activation, languages
    model, task = load_moe_model(checkpoint, data, batch_size)
    say(f"measuring the experts of {checkpoint} on {split}, language by language")
    activation, languages = _measure(model, task, split, batch_size, identity)
    write_activation(activation_file(folder, split), activation)
    write_languages(languages_file(folder, split), languages)
    return activation, languages


def _measure(
    model: torch.nn.Module,
    task: MHMoEMultilingualLanguageModelingTask,
    split: str,
    batch_size: int,
    identity: tuple[str, str, str],
) -> tuple[Activation, LanguageRouting]:
    base, languages = task.split_of(split)
    whole, counts, pieces = RoutingCounts(), [], []
    for language in languages:
        counts.append(count_split(model, task, f"{base}_{language}", batch_size))
        whole.add(counts[-1])
        pieces.append(torch.stack([count_routing(model, [piece]).load_LE for piece in _pieces(task, base, language)]))
    activation = Activation.of(whole, *identity)
    return activation, LanguageRouting(
        *identity,
        layers=activation.layers,
        languages=languages,
        tokens=[count.tokens for count in counts],
        loss=[count.bits / count.tokens for count in counts],
        load=[count.load_LE.tolist() for count in counts],
        guesses=language_guesses(pieces).tolist(),
        piece_tokens=PIECE_TOKENS,
    )


def _pieces(task: MHMoEMultilingualLanguageModelingTask, split: str, language: str) -> Iterator[dict[str, Any]]:
    """The beginnings of blocks spread over a split, as batches of one: a causal model routes them as in the block."""
    dataset = task.dataset(f"{split}_{language}")
    for index in np.unique(np.linspace(0, len(dataset) - 1, PIECES).astype(int)):
        batch = dataset.collater([dataset[index]])
        batch["net_input"]["src_tokens"] = batch["net_input"]["src_tokens"][:, :PIECE_TOKENS]
        batch["target"] = batch["target"][:, :PIECE_TOKENS]
        yield batch


def activation_file(folder: Path, split: str) -> Path:
    """Where a split's activation is kept."""
    return folder / f"activation-{split}.json"


def languages_file(folder: Path, split: str) -> Path:
    """Where a split's languages are kept."""
    return folder / f"languages-{split}.json"


def write_languages(path: Path, routing: LanguageRouting) -> None:
    """The counts, and what follows from them, as JSON."""
    derived = {
        "overlap": routing.overlap_LGG().tolist(),
        "mean_overlap": routing.mean_overlap(),
        "accuracy": routing.accuracy(),
    }
    write_json(path, {**asdict(routing), "derived": derived})


def read_languages(path: Path) -> LanguageRouting | None:
    """What ``write_languages`` wrote; None if there is no such file, or it is of another kind."""
    kept = read_json(path) if path.is_file() else {}
    fields = {key: value for key, value in kept.items() if key in LanguageRouting.__dataclass_fields__}
    return LanguageRouting(**fields) if len(fields) == len(LanguageRouting.__dataclass_fields__) else None
