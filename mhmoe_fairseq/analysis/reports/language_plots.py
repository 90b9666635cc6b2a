"""PNG figures of languages: experts' loads, what languages share, perplexities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..routing.language_routing import LanguageRouting
from .aggregate import mean_and_deviation
from .plots import draw_group_loads, heat_map, new_figure, save_figure


def draw_language_loads(path: Path, routing: LanguageRouting, title: str) -> None:
    """Heat maps, languages by experts, one for every MoE layer: the loads over the mean of the language."""
    draw_group_loads(path, routing.load_GLE, routing.layers, routing.languages, f"{title}: expert load by language")


def draw_language_matrices(path: Path, routing: LanguageRouting, title: str) -> None:
    """What two languages share, mean of the layers; and which language a piece of each was taken for."""
    guesses_GG = torch.tensor(routing.guesses[-1])
    guessed_GG = guesses_GG / guesses_GG.sum(1, keepdim=True).clamp(min=1)
    size = 2.2 + 0.3 * len(routing.languages)
    figure = new_figure(2 * size, size)
    left, right = figure.subplots(1, 2)
    shared_GG = routing.overlap_LGG().mean(0)
    lowest = math.floor(10 * shared_GG.min().item()) / 10
    _matrix(left, shared_GG, routing.languages, "share of load in common (mean of layers)", lowest)
    _matrix(right, guessed_GG, routing.languages, f"language guessed from {routing.piece_tokens} tokens' routing")
    right.set(xlabel="guessed", ylabel="language")
    figure.suptitle(title)
    save_figure(figure, path)


def _matrix(axes: Any, values: Tensor, names: Sequence[str], title: str, lowest: float = 0.0) -> None:
    image = heat_map(axes, values, names, highest=1.0, lowest=lowest)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_title(title, fontsize=9)
    axes.figure.colorbar(image, ax=axes)


def draw_language_bars(path: Path, values: dict[str, dict[str, list[float]]], title: str, ylabel: str) -> None:
    """For every language a group of bars, one for each model: the mean over seeds and its standard deviation.

    Args:
        values: model -> language -> a value for each seed.
    """
    languages = list(dict.fromkeys(language for by_language in values.values() for language in by_language))
    figure = new_figure(2.0 + 0.25 * len(languages) * (len(values) + 1), 4.2)
    axes = figure.subplots()
    width = 1 / (len(values) + 1)
    for place, (model, by_language) in enumerate(values.items()):
        measured = [(number, by_language[name]) for number, name in enumerate(languages) if by_language.get(name)]
        spread = [mean_and_deviation(seeds) for _, seeds in measured]
        axes.bar(
            [number + (place - (len(values) - 1) / 2) * width for number, _ in measured],
            [middle for middle, _ in spread],
            width,
            yerr=[deviation or 0.0 for _, deviation in spread],
            error_kw={"elinewidth": 0.8},
            label=model,
        )
    axes.set_xticks(range(len(languages)), languages)
    axes.set(title=title, ylabel=ylabel)
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=8)
    save_figure(figure, path)
