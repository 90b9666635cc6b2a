"""Log-likelihoods of text under a trained language model: batched, and those of fairseq's own scorer.

Text becomes tokens as in training. Every line is cleaned as ``mhmoe prepare`` cleans its corpora (Unicode NFC, single
spaces) and encoded by itself; between two lines stands ``</s>``, the token that ends every line of the training data.
A raw newline is in no vocabulary. fairseq's ``hub.score(text, replace_newline_with_eos=True)``, made for the XGLM
models, does the same, except that it never scores the line end of a text's last line: here ``"yes\\n"`` ends in
``</s>``. Every text is conditioned on a leading ``</s>``, as by fairseq's scorer (``<s>`` after training with
``--add-bos-token``), or on its language's symbol.

A score does not depend on the batch. Padding is on the right, where causal attention never looks, and is not routed.
Models with capacity routing, whose experts refuse tokens by what else is in the batch, are scored row by row.
"""

import logging
import os.path
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from fairseq.hub_utils import GeneratorHubInterface

from ..checkpoints.open import was_trained_with
from ..common.errors import UserError
from ..common.timing import tracked
from ..data.documents import clean_line
from ..data.languages import language_symbol

T = TypeVar("T")
logger = logging.getLogger(__name__)

DEFAULT_BATCH_TOKENS = 8192


class Score(NamedTuple):
    """The score of a continuation.

    Attributes:
        log_prob: natural logarithm of its probability, summed over its ``num_tokens`` tokens.
        is_greedy: whether every token is the most probable one.
    """

    log_prob: float
    is_greedy: bool
    num_tokens: int


class Window(NamedTuple):
    """What the model reads, and the ids it has to predict at the last ``len(targets)`` positions of it."""

    inputs: list[int]
    targets: list[int]


class TextScorer:
    """Scores continuations of contexts.

    Args:
        model: from ``open_text_model``.
        batch_size: most rows per batch; None for as many as ``batch_tokens`` allow.
        batch_tokens: most tokens per batch, padding included; a row that is longer goes alone.
        max_length: most tokens that the model reads at once (default: its positions).
        language: code whose symbol ``__xx__`` leads every text in place of ``</s>``, for models that were trained with
            ``--mhmoe-language-token``.
        clean: prepare lines as ``mhmoe prepare`` does; False takes them as they are.

    Raises:
        UserError: naming the argument, its value and the rule.
    """

    def __init__(
        self,
        model: GeneratorHubInterface,
        *,
        batch_size: int | None = None,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        max_length: int | None = None,
        language: str | None = None,
        clean: bool = True,
    ) -> None:
        positions = model.models[0].max_decoder_positions()
        for name, value in (("batch_size", batch_size), ("batch_tokens", batch_tokens), ("max_length", max_length)):
            if value is not None and value < 1:
                raise UserError(f"{name} ({value}) must be at least 1")
        if (max_length or 1) > positions:
            raise UserError(f"max_length ({max_length}) must be at most {positions}, the model's positions")
        self.model = model
        self.decoder = model.models[0].decoder.eval()
        self.dictionary = model.src_dict
        drops_tokens = any(getattr(module, "drops_tokens", False) for module in self.decoder.modules())
        self.batch_size = 1 if drops_tokens else batch_size
        self.batch_tokens = batch_tokens
        self.max_length = max_length or positions
        self.clean = clean
        self._told_of_unknown_words = False
        self.set_language(language)

    def set_language(self, language: str | None) -> None:
        """Lead texts with this language's symbol from now on; None for the ``</s>`` or ``<s>`` of every text.

        Raises:
            UserError: the dictionary has no such symbol.
        """
        start = self.dictionary.bos() if was_trained_with(self.model, "add_bos_token") else self.dictionary.eos()
        self.leading_symbol = start if language is None else self.language_id(language)
        self._keeps_leading_symbol = language is not None

    def language_id(self, language: str) -> int:
        """Index of a language's symbol.

        Raises:
            UserError: the dictionary has no such symbol.
        """
        symbol = language_symbol(language)
        if symbol not in self.dictionary:
            raise UserError(
                f"lang {language}: the dictionary has no {symbol}; was the data made for several languages?"
            )
        return self.dictionary.index(symbol)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, line ends inside or at its end as ``</s>``; nothing is added before or after."""
        *whole, last = (text + "|").splitlines()  # the stroke keeps a line end at the end of the text
        tokens: list[int] = []
        for line in whole:
            tokens += [*self._encode_line(line), self.dictionary.eos()]
        return tokens + self._encode_line(last[:-1])

    def _encode_line(self, line: str) -> list[int]:
        line = clean_line(line) if self.clean else line
        if not line:
            return []
        tokens = self.model.encode(line)[:-1]
        if not self._told_of_unknown_words and tokens.eq(self.dictionary.unk()).any():
            self._told_of_unknown_words = True
            logger.warning(f"the text has words that the dictionary lacks, scored as <unk>: {line!r}")
        return tokens.tolist()

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of the whole text, split where the continuation begins.

        White space at the context's end, line ends included, counts to the continuation, as in lm-eval. Tokens that
        the context alone would not have, as where one covers its end and the continuation's start, are scored.

        Raises:
            UserError: if no token is left of a continuation. Nothing is certain to follow anything: it would win every
                choice.
        """
        whole = self.encode(context + continuation)
        known = self.encode(context.rstrip())
        length = len(os.path.commonprefix([known, whole]))
        if length == len(whole):
            raise UserError(
                f"the continuation {continuation!r} of {context[-40:]!r} has no token to score: white space alone, and "
                "what mhmoe prepare removes from its text, is in no vocabulary"
            )
        return whole[:length], whole[length:]

    def prompt(self, context: str, room: int) -> list[int]:
        """Ids to go on from, at most ``room``: leading symbol and context, cut on the left as lm-eval cuts them."""
        tokens = [self.leading_symbol, *self.encode(context)][-room:]
        if self._keeps_leading_symbol:  # the model never saw a text without its language
            tokens[0] = self.leading_symbol
        return tokens

    def scores(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[tuple[int, Score]]:
        """Score every continuation once, the longest texts first.

        Contexts that do not fit are cut on the left. Of a continuation that does not fit itself, each token is
        predicted once, ``max_length`` of them at a time, as lm-eval defines its rolling log-likelihood.

        Args:
            pairs: ids of contexts, without the leading symbol, and of their continuations.

        Yields:
            the index of a pair and its score, in order of completion.
        """
        windows = [
            self.windows([self.leading_symbol, *context, *continuation], len(continuation))
            for context, continuation in pairs
        ]
        yield from ((index, _total([])) for index, found in enumerate(windows) if not found)
        pending = [(index, window) for index, found in enumerate(windows) for window in found]
        parts: dict[int, list[Score]] = defaultdict(list)
        for batch in self.batches(pending, lambda entry: len(entry[1].inputs)):
            for (index, _), score in zip(batch, self._score_batch([window for _, window in batch])):
                parts[index].append(score)
                if len(parts[index]) == len(windows[index]):
                    yield index, _total(parts.pop(index))

    def score_all(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        """As ``scores``, in the order of ``pairs``."""
        found = dict(tracked(self.scores(pairs), "score", "texts", total=len(pairs)))
        return [found[index] for index in range(len(pairs))]

    def windows(self, tokens: list[int], num_scored: int) -> list[Window]:
        """What to read to predict the last ``num_scored`` of ``tokens``, each once, with as much context as fits."""
        found = []
        start = len(tokens) - num_scored
        while start < len(tokens):
            end = min(start + self.max_length, len(tokens))
            inputs = tokens[max(0, end - 1 - self.max_length) : end - 1]
            if self._keeps_leading_symbol:  # the model never saw a text without its language
                inputs[0] = tokens[0]
            found.append(Window(inputs, tokens[start:end]))
            start = end
        return found

    def batches(self, entries: Iterable[T], length: Callable[[T], int]) -> Iterator[list[T]]:
        """The entries, the longest first, in batches of no more rows and tokens than the scorer may read at once."""
        pending = sorted(entries, key=length, reverse=True)
        start = 0
        while start < len(pending):
            rows = max(1, self.batch_tokens // length(pending[start]))
            rows = min(rows, self.batch_size or rows)
            yield pending[start : start + rows]
            start += rows

    @torch.no_grad()
    def _score_batch(self, windows: list[Window]) -> list[Score]:
        device = self.model.device
        inputs = torch.full((len(windows), len(windows[0].inputs)), self.dictionary.pad())
        is_scored = torch.zeros(inputs.shape, dtype=torch.bool)
        for row, window in enumerate(windows):
            end = len(window.inputs)
            inputs[row, :end] = torch.tensor(window.inputs)
            is_scored[row, end - len(window.targets) : end] = True
        features, _ = self.decoder(inputs.to(device), features_only=True)
        targets = torch.tensor([token for window in windows for token in window.targets], device=device)
        # A text may name the padding symbol, which is as improbable as others.
        losses, is_best = self.decoder.predict(
            features[is_scored.to(device)], targets, with_best=True, has_padding=False
        )
        lengths = [len(window.targets) for window in windows]
        return [
            Score(-float(row.sum()), bool(best.all()), length)
            for row, best, length in zip(losses.cpu().double().split(lengths), is_best.cpu().split(lengths), lengths)
        ]


def _total(parts: list[Score]) -> Score:
    return Score(
        sum(part.log_prob for part in parts),
        all(part.is_greedy for part in parts),
        sum(part.num_tokens for part in parts),
    )
