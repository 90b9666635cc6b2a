"""To how many different experts the sub-tokens of polysemous words go, beside a matched control (P1's figure 7)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ...checkpoints.open import Opened, open_model
from ...common.errors import UserError
from ...data.word_lists import WordLists
from ...evaluation.evaluate import evaluated_data, with_origin
from ...evaluation.records import Metric, Record
from ...models.language_model import MHMoELanguageModel
from .listening import RoutedCall, expert_pools, listening, most_distinct
from .words import find_words, symbol_texts

UNIT = "experts/token"
SAMPLES = 10_000  # of the bootstrap
_SEED = 1
_CALIPER = 0.5  # of log2 of how often words occur
_BATCH = 32


@dataclass
class Word:
    """A word in the analysed split.

    Attributes:
        counts: by occurrence and MoE layer, the mean over the word's tokens of each one's number of different experts.
        tokens: of all occurrences together.
    """

    counts: list[np.ndarray] = field(default_factory=list)
    tokens: int = 0

    @property
    def occurrences(self) -> int:
        """How often it occurs."""
        return len(self.counts)

    @property
    def pieces(self) -> int:
        """Of how many tokens it consists, on average, rounded."""
        return round(self.tokens / self.occurrences)

    @property
    def experts_L(self) -> np.ndarray:
        """By layer, different experts of a token, mean over the occurrences."""
        return np.mean(self.counts, axis=0)


class Comparison(NamedTuple):
    """Pairs of a polysemous and a control word.

    Attributes:
        values_P2L: different experts of each word by layer, ``(pairs, 2, layers)``.
        interval: 95 % of the bootstrap over pairs, of the mean difference.
        stderr: its standard error.
    """

    values_P2L: np.ndarray
    interval: tuple[float, float]
    stderr: float

    @property
    def difference(self) -> float:
        """Mean difference, polysemous less control, mean of the layers."""
        return float(np.mean(self.by_layer))

    @property
    def by_layer(self) -> list[float]:
        """The mean difference in each layer."""
        return (self.values_P2L[:, 0] - self.values_P2L[:, 1]).mean(0).tolist()


def measure_polysemy(
    checkpoint: Path,
    data: Path,
    split: str,
    lists: WordLists,
    batch_size: int | None = None,
    device: str | None = None,
    precision: str | None = None,
) -> Record:
    """Route a split once and compare the words of both lists that it has.

    Args:
        checkpoint: of a language model with experts.
        batch_size: blocks per batch.
        device, precision: see ``open_model``.

    Returns:
        a record, what="polysemy": the mean ``difference`` over pairs with its bootstrap standard error; parts are the
        groups, paired and all found. In ``settings``: ``interval``, ``most_experts``, ``difference_by_layer``, and
        ``pairs`` as ``[polysemous word, experts, control word, experts]``.

    Raises:
        UserError: a model of another kind or without experts, or a split with fewer than two pairs of words.
    """
    opened = open_model(checkpoint, data, device, precision=precision)
    if not isinstance(opened.model, MHMoELanguageModel):
        raise UserError(f"{checkpoint} is no language model: --polysemy looks at the words of text")
    layers = list(expert_pools(opened.model))
    if not layers:
        raise UserError(f"{checkpoint} is a dense model: it has no experts to measure")
    found = count_words(opened, split, {*lists.polysemous, *lists.control}, batch_size or _BATCH)
    groups = {
        name: {word: found[word] for word in words if word in found}
        for name, words in (("polysemous", lists.polysemous), ("control", lists.control))
    }
    pairs = pair_words(*groups.values())
    if len(pairs) < 2:
        there = " and ".join(f"{len(words)} {name}" for name, words in groups.items())
        raise UserError(
            f"{split} has {there} words of the lists, which make {len(pairs)} pairs of like frequency: too few to "
            "compare"
        )
    compared = compare_pairs(np.array([[found[word].experts_L for word in pair] for pair in pairs]))
    means_P2 = compared.values_P2L.mean(-1)
    metrics = {"difference": Metric(compared.difference, UNIT, compared.stderr, len(pairs))}
    parts = {name: _metrics(means_P) for name, means_P in zip(groups, means_P2.T)}
    parts |= {f"all {name}": _metrics([word.experts_L.mean() for word in of.values()]) for name, of in groups.items()}
    settings = {
        "rule": lists.rule,
        "interval": compared.interval,
        "bootstrap": {"samples": SAMPLES, "seed": _SEED},
        "most_experts": most_distinct(opened.model),
        "difference_by_layer": dict(zip((str(layer + 1) for layer in layers), compared.by_layer)),
        **{name: _describe(words, [pair[side] for pair in pairs]) for side, (name, words) in enumerate(groups.items())},
        "pairs": [[one, float(left), other, float(right)] for (one, other), (left, right) in zip(pairs, means_P2)],
    }
    record = Record("polysemy", split, metrics, parts, settings=settings, data=evaluated_data(opened, split))
    return with_origin(record, opened)


def _metrics(means: Sequence[float]) -> dict[str, Metric]:
    """The mean over words, with its standard error."""
    deviation = float(np.std(means, ddof=1)) if len(means) > 1 else 0.0
    return {"experts per token": Metric(float(np.mean(means)), UNIT, deviation / len(means) ** 0.5, len(means))}


def _describe(words: Mapping[str, Word], paired: Sequence[str]) -> dict[str, float]:
    """How often a group's paired words occur, together and as the geometric mean, and of how many tokens they are."""
    occurrences = [words[word].occurrences for word in paired]
    return {
        "occurrences": sum(occurrences),
        "typical_occurrences": float(np.exp(np.log(occurrences).mean())),
        "tokens_per_word": float(np.mean([words[word].pieces for word in paired])),
    }


@torch.no_grad()
def count_words(opened: Opened, split: str, words: set[str], batch_size: int = _BATCH) -> dict[str, Word]:
    """Route every block of a split and return the words that it has whole in a block, with their tokens' experts."""
    opened.task.load_dataset(split)
    texts, pad = symbol_texts(opened.task.dictionary, opened.data), opened.task.dictionary.pad()
    found: dict[str, Word] = {}
    calls: list[RoutedCall] = []
    with listening(opened.model, calls.append):
        for batch in opened.batches(opened.task.dataset(split), batch_size):
            tokens, targets = batch["net_input"]["src_tokens"], batch["target"]
            opened.model(tokens, features_only=True)
            call = calls.pop()
            distinct_BSL = torch.stack([call.distinct(layer) for layer in call.choices], dim=-1).cpu().numpy()
            for distinct_SL, row, target in zip(distinct_BSL, tokens.tolist(), targets.tolist()):
                length = len(target) - target.count(pad)
                block = [texts[index] for index in [*row[:length], target[length - 1]]]
                for word, start, stop in find_words(block, words):
                    kept = found.setdefault(word, Word())
                    kept.counts.append(distinct_SL[start:stop].mean(0))
                    kept.tokens += stop - start
    return found


def pair_words(polysemous: Mapping[str, Word], control: Mapping[str, Word]) -> list[tuple[str, str]]:
    """Return pairs of words of both groups of equally many tokens and like frequency, each word once at most.

    The closest in frequency are paired first, equally close ones in an order drawn from a seed; words that occur more
    than ``2 ** 0.5`` times as often as another are no pair.
    """
    names = list(polysemous), list(control)
    sizes, pieces = (
        [np.array([getattr(words[name], what) for name in of]) for words, of in zip((polysemous, control), names)]
        for what in ("occurrences", "pieces")
    )
    gaps_PC = np.abs(np.log2(sizes[0])[:, None] - np.log2(sizes[1])[None])
    gaps_PC[(pieces[0][:, None] != pieces[1][None]) | (gaps_PC > _CALIPER)] = np.inf
    drawn = np.random.default_rng(_SEED).random(gaps_PC.size)
    free, pairs = (set(names[0]), set(names[1])), []
    for at in np.lexsort([drawn, gaps_PC.ravel()])[: np.isfinite(gaps_PC).sum()]:
        one, other = names[0][at // len(names[1])], names[1][at % len(names[1])]
        if one in free[0] and other in free[1]:
            pairs.append((one, other))
            free[0].remove(one)
            free[1].remove(other)
    return pairs


def compare_pairs(values_P2L: np.ndarray, seed: int = _SEED) -> Comparison:
    """Compare both words of each pair; the interval is the percentile bootstrap's over pairs.

    Args:
        values_P2L: see ``Comparison``.
        seed: of the bootstrap.
    """
    means_P2 = values_P2L.mean(-1)
    differences_P = means_P2[:, 0] - means_P2[:, 1]
    drawn = np.random.default_rng(seed).integers(len(differences_P), size=(SAMPLES, len(differences_P)))
    means = differences_P[drawn].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Comparison(values_P2L, (float(low), float(high)), float(means.std()))
