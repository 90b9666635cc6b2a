"""Expert loads by part, such as a language or a modality: what parts share, and whether routing tells them apart."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ...evaluation.records import ExpertLoads


@dataclass(frozen=True)
class PartLoads:
    """Assignments to experts by part.

    Attributes:
        parts: G names, such as languages.
        layers: indices of the L MoE layers in the model, from 0.
        load_GLE: ``(G, L, E)`` float64 assignments before dropping; where a layer has experts of its own for images
            and for text, the text's follow the images'.
    """

    parts: list[str]
    layers: list[int]
    load_GLE: np.ndarray

    @classmethod
    def of(cls, experts: ExpertLoads) -> "PartLoads":
        """The loads of every part; those of the whole split are left out."""
        layers = list(dict.fromkeys(row.layer for row in experts.layers))
        pools = list(dict.fromkeys(row.pool for row in experts.layers))
        size = max(len(row.loads) for row in experts.layers)
        load_GLPE = np.zeros((len(experts.parts), len(layers), len(pools), size))
        for row in experts.layers:
            if row.part is not None:
                load_GLPE[experts.parts.index(row.part), layers.index(row.layer), pools.index(row.pool)] = row.loads
        return cls(experts.parts, layers, load_GLPE.reshape(*load_GLPE.shape[:2], -1))

    def overlap_LGG(self) -> np.ndarray:
        """Per layer, the share of their assignments that two parts have in common, ``(L, G, G)``.

        ``sum over experts of min(p_e, q_e)`` of the parts' shares p and q: 1 where they use the experts alike, 0 where
        they share none; one minus the total variation distance.
        """
        share_GLE = self.load_GLE / self.load_GLE.sum(-1, keepdims=True)
        return np.minimum(share_GLE[:, None], share_GLE[None]).sum(-1).transpose(2, 0, 1)

    def mean_overlap(self) -> list[float]:
        """Per layer, the share in common, mean over pairs of different parts; 1 where there is one part."""
        pairs = len(self.parts) * (len(self.parts) - 1)
        return [(layer_GG.sum() - np.trace(layer_GG)) / pairs if pairs else 1.0 for layer_GG in self.overlap_LGG()]


def part_guesses(loads: Sequence[np.ndarray]) -> np.ndarray:
    """How often a piece of a language (row) was taken for a language (column), ``(L + 1, G, G)``.

    The guess is naive Bayes': every language has its shares of the experts, counted on every second piece with one
    assignment more for each expert; of the other pieces, that language is guessed under which their assignments are
    most probable. By each layer alone, and last by all layers together.

    Args:
        loads: for each of G languages ``(P, L, E)``, the assignments of its pieces.
    """
    known_GLE = np.stack([pieces[::2].sum(0) for pieces in loads]) + 1
    log_share_GLE = np.log(known_GLE / known_GLE.sum(-1, keepdims=True))
    layers, languages = known_GLE.shape[1], len(loads)
    guesses = np.zeros((layers + 1, languages, languages), dtype=int)
    for language, pieces in enumerate(loads):
        likelihood_PLG = np.einsum("ple,gle->plg", pieces[1::2], log_share_GLE)
        together_PLG = np.concatenate([likelihood_PLG, likelihood_PLG.sum(1, keepdims=True)], axis=1)
        guessed_PL = together_PLG.argmax(-1)
        for layer in range(layers + 1):
            guesses[layer, language] = np.bincount(guessed_PL[:, layer], minlength=languages)
    return guesses


def guess_shares(guesses_GG: ArrayLike) -> np.ndarray:
    """The guesses of each language as shares of all about it."""
    guesses_GG = np.asarray(guesses_GG)
    return guesses_GG / np.maximum(guesses_GG.sum(1, keepdims=True), 1)


def accuracy(guesses_GG: ArrayLike) -> float:
    """The share of right guesses, every language counting alike."""
    return float(guess_shares(guesses_GG).diagonal().mean())
