"""A cross-lingual probe of our own, not XNLI: which of n sentences translates the one before it?

From aligned held-out text (``aligned/test.jsonl`` of ``mhmoe prepare multilingual``): after a sentence and its line
end, a model scores the sentence's translation and n - 1 distractors, sentences of similar length in the same language
from the same split. A model that links the two languages prefers the translation. Names, numbers and markup that both
languages write alike are cues, too: compare models with one another, and read no level of understanding off a figure.

Two ways to choose: the highest log-probability per token, and the largest gain that the sentence before brings, the
log-probability after it minus that at the start of a text (pointwise mutual information, PMI).
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..checkpoints.open import was_trained_with
from ..common.errors import UserError
from ..common.files import read_json_lines
from ..data.languages import get_language
from .records import Metric, mean_percent
from .scoring import Score, TextScorer

_PIVOT = "en"
_NEIGHBOURS = 20  # distractors are drawn from so many next shorter and next longer sentences


class Aligned(NamedTuple):
    """One key of the aligned text: a sentence by language."""

    key: str
    text: dict[str, str]


class Item(NamedTuple):
    """One question.

    Attributes:
        candidates: sentences of the other language, the translation of the context at index ``answer``.
    """

    context: str
    candidates: tuple[str, ...]
    answer: int


def read_aligned(path: Path) -> list[Aligned]:
    """The aligned text: a JSON object a line, ``{"key": str, "text": {"en": str, "de": str, ...}}``.

    Raises:
        UserError: naming the file, the line and what is wrong there.
    """
    found = []
    for line, row in read_json_lines(path):
        if not isinstance(row, dict) or not isinstance(row.get("key"), str):
            raise UserError(f"{line}: needs a JSON object with a field 'key', a text")
        text = row.get("text")
        if not isinstance(text, dict) or not all(isinstance(value, str) for value in text.values()):
            raise UserError(f"{line}: field 'text' must be an object of texts by language")
        found.append(Aligned(row["key"], text))
    if not found:
        raise UserError(f"{path}: no aligned text in it")
    return found


def make_items(
    aligned: Sequence[Aligned],
    source: str,
    target: str,
    *,
    candidates: int = 4,
    seed: int = 1,
    most: int | None = None,
    min_characters: int = 10,
) -> list[Item]:
    """The questions of a pair of languages: the same for the same text and seed, whatever the order of the lines.

    Args:
        source, target: languages of the contexts and of the candidates.
        candidates: per question, at least 2, the translation counted.
        seed: of the choice of questions, distractors and their order.
        most: at most so many questions, drawn at random.
        min_characters: shorter sentences are left out.

    Raises:
        UserError: too little text is aligned.
    """
    by_target: dict[str, Aligned] = {}
    for one in sorted(aligned, key=lambda one: one.key):
        before, after = one.text.get(source, ""), one.text.get(target, "")
        if min(len(before), len(after)) >= min_characters and before != after:
            by_target.setdefault(after, one)
    pool = sorted(by_target.values(), key=lambda one: (len(one.text[target]), one.key))
    if len(pool) < candidates:
        raise UserError(
            f"{source}-{target}: {len(pool)} aligned sentences of at least {min_characters} characters, but a question "
            f"needs {candidates}"
        )
    chosen: Sequence[int] = range(len(pool))
    if most is not None and most < len(pool):
        chosen = sorted(random.Random(f"{seed} {source} {target}").sample(chosen, most))
    return [_item(pool, index, source, target, candidates, seed) for index in chosen]


def _item(pool: list[Aligned], index: int, source: str, target: str, candidates: int, seed: int) -> Item:
    one = pool[index]
    reach = max(_NEIGHBOURS, candidates)
    others = [*pool[max(0, index - reach) : index], *pool[index + 1 : index + 1 + reach]]
    # A distractor with the same context would be right, too.
    apart = [other for other in others if other.text[source] != one.text[source]]
    if len(apart) < candidates - 1:
        raise UserError(f"{source}-{target}: too few sentences of similar length around {one.key!r} to draw from")
    draw = random.Random(f"{seed} {source} {target} {one.key}")
    texts = [one.text[target], *(other.text[target] for other in draw.sample(apart, candidates - 1))]
    draw.shuffle(texts)
    return Item(one.text[source], tuple(texts), texts.index(one.text[target]))


def score_items(
    scorer: TextScorer, items: Sequence[Item], source: str, target: str, *, language_symbols: bool | None = None
) -> tuple[list[list[Score]], list[list[Score]]]:
    """Scores of every candidate after its context, and at the start of a text.

    Args:
        language_symbols: a language's symbol stands before each sentence in place of ``</s>`` (default: if the model
            was trained so).
    """
    if language_symbols is None:
        language_symbols = was_trained_with(scorer.model, "mhmoe_language_token")
    middle = scorer.language_id(target) if language_symbols else scorer.dictionary.eos()
    scorer.set_language(source if language_symbols else None)
    contexts = [[*scorer.encode(item.context), middle] for item in items]
    pairs = [(context, scorer.encode(text)) for context, item in zip(contexts, items) for text in item.candidates]
    after = iter(scorer.score_all(pairs))
    scorer.set_language(target if language_symbols else None)
    texts = list(dict.fromkeys(text for item in items for text in item.candidates))
    alone = dict(zip(texts, scorer.score_all([([], scorer.encode(text)) for text in texts])))
    return (
        [[next(after) for _ in item.candidates] for item in items],
        [[alone[text] for text in item.candidates] for item in items],
    )


def probe(
    scorer: TextScorer, items: Sequence[Item], source: str, target: str, *, language_symbols: bool | None = None
) -> dict[str, Metric]:
    """Score the questions of a pair of languages: the share of right answers by each way to choose, in percent."""
    after, alone = score_items(scorer, items, source, target, language_symbols=language_symbols)
    by_length, by_pmi = [], []
    for item, scores, before in zip(items, after, alone):
        per_token = [score.log_prob / max(1, score.num_tokens) for score in scores]
        gain = [score.log_prob - other.log_prob for score, other in zip(scores, before)]
        by_length.append(per_token.index(max(per_token)) == item.answer)
        by_pmi.append(gain.index(max(gain)) == item.answer)
    chance = {"chance": 100 / len(items[0].candidates)}
    return {"per token": mean_percent(by_length, chance), "PMI": mean_percent(by_pmi, chance)}


def parse_pairs(text: str) -> list[tuple[str, str]]:
    """``en-de,de-en`` as pairs.

    Raises:
        UserError: naming what is no pair of two different known languages, or given twice.
    """
    pairs = []
    for part in text.split(","):
        codes = tuple(part.strip().split("-"))
        if len(codes) != 2 or codes[0] == codes[1]:
            raise UserError(f"--pairs {part}: must be two different language codes with a hyphen, such as en-de")
        for code in codes:
            get_language(code, "--pairs")
        if codes in pairs:
            raise UserError(f"--pairs {part}: given twice")
        pairs.append((codes[0], codes[1]))
    return pairs


def default_pairs(aligned: list[Aligned]) -> list[tuple[str, str]]:
    """English and each other language of the text, both ways.

    Raises:
        UserError: there is no English, or nothing else.
    """
    codes = sorted({code for one in aligned if _PIVOT in one.text for code in one.text} - {_PIVOT})
    if not codes:
        raise UserError("the aligned text has no language beside English: name pairs with --pairs")
    return [(_PIVOT, code) for code in codes] + [(code, _PIVOT) for code in codes]
