"""How alike the experts' loads of languages are, and whether routing tells a text's language."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def overlap(load_GLE: Tensor) -> Tensor:
    """``(L, G, G)``: the share of their assignments that two languages have in common.

    ``sum over experts of min(p_e, q_e)`` of the languages' shares p and q: 1 where they use the experts alike, 0 where
    they share none; one minus the total variation distance.

    Args:
        load_GLE: assignments of G languages in L layers to E experts.
    """
    share_GLE = load_GLE / load_GLE.sum(-1, keepdim=True)
    return torch.minimum(share_GLE[:, None], share_GLE[None]).sum(-1).permute(2, 0, 1)


def mean_overlap(overlap_GG: Tensor) -> float:
    """Over all pairs of two different languages; of one language 1."""
    languages = len(overlap_GG)
    if languages == 1:
        return 1.0
    return float((overlap_GG.sum() - overlap_GG.trace()) / (languages * (languages - 1)))


def language_guesses(loads: Sequence[Tensor]) -> Tensor:
    """``(L + 1, G, G)``: how often a piece of a language (row) was taken for a language (column).

    The guess is naive Bayes': every language has its shares of the experts, counted on every second piece with one
    assignment more for each expert; of the other pieces, that language is guessed under which their assignments are
    most probable. By each layer alone, and last by all layers together.

    Args:
        loads: for each of G languages ``(P, L, E)``, the assignments of its pieces.
    """
    known_GLE = torch.stack([pieces[::2].sum(0) for pieces in loads]) + 1
    log_share_GLE = (known_GLE / known_GLE.sum(-1, keepdim=True)).log()
    layers, languages = known_GLE.size(1), len(loads)
    guesses = torch.zeros(layers + 1, languages, languages, dtype=torch.int64)
    for language, pieces in enumerate(loads):
        likelihood_PLG = torch.einsum("ple,gle->plg", pieces[1::2], log_share_GLE)
        together_PLG = torch.cat([likelihood_PLG, likelihood_PLG.sum(1, keepdim=True)], dim=1)
        guessed_PL = together_PLG.argmax(-1)
        for layer in range(layers + 1):
            guesses[layer, language] = torch.bincount(guessed_PL[:, layer], minlength=languages)
    return guesses


def accuracy(guesses_GG: Tensor) -> float:
    """Share of right guesses, every language counting alike."""
    right_G = guesses_GG.diagonal() / guesses_GG.sum(1).clamp(min=1)
    return float(right_G.mean())
