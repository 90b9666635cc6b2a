"""Continue prompts with a trained language model: to the end of a line, or token ids until a stop string.

The first is a thin layer on fairseq's ``GeneratorHubInterface``: prompts are checked before the first is decoded,
batched, and come back in order, each with its score.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import fairseq.search
import torch
from fairseq import utils
from fairseq.hub_utils import GeneratorHubInterface
from torch import Tensor

from ..common.errors import UserError
from ..common.timing import tracked


@dataclass(frozen=True)
class Search:
    """How to choose the next token.

    Args:
        beam: hypotheses kept by beam search; 1 is greedy.
        max_len_b: longest text in tokens, the prompt included, the end mark not (fairseq's ``--max-len-b``).
        sampling: draw from the distribution in place of searching the best text.
        temperature: divides the logits; below 1 sharpens the distribution.
        top_k: sample among the k most probable tokens only; None for all.
        top_p: sample among the most probable tokens that together have this probability; None for all.
        seed: of the random numbers; without sampling none are drawn.

    Raises:
        UserError: naming the flag, its value and the rule.
    """

    beam: int = 1
    max_len_b: int = 200
    sampling: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        for flag, value in (("--beam", self.beam), ("--max-len-b", self.max_len_b), ("--top-k", self.top_k)):
            if value is not None and value < 1:
                raise UserError(f"{flag} ({value}) must be at least 1")
        if not self.temperature > 0:
            raise UserError(f"--temperature ({self.temperature}) must be positive")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top-p ({self.top_p}) must be in (0, 1]")
        limits = [flag for flag, value in (("--top-k", self.top_k), ("--top-p", self.top_p)) if value is not None]
        if len(limits) > 1:
            raise UserError("--top-k and --top-p exclude each other")
        if limits and not self.sampling:
            raise UserError(f"{limits[0]} needs --sampling")


class PromptSampling(fairseq.search.Sampling):
    """fairseq's sampling, for prompts of any probability.

    fairseq forces a prompt's token by ruling out all others, and then draws in proportion to its probability, which
    fails where that one, sharpened by a temperature below 1, is no longer a float32.
    """

    FLOOR = -80.0  # exp of it is still a normal float32, and no token of such probability is ever drawn

    def step(self, step: int, lprobs: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As ``Sampling.step``, on ``lprobs`` that are -inf or at least the floor."""
        return super().step(step, lprobs.clamp(min=self.FLOOR).where(lprobs > -torch.inf, lprobs), *args, **kwargs)


class Continuation(NamedTuple):
    """A prompt's text to its end.

    Attributes:
        text: the whole text, prompt included.
        score: mean log-probability (nats) of the text's tokens and its end mark, if it has one.
        tokens: the same tokens in the dictionary's words.
        token_scores: their log-probabilities.
    """

    prompt: str
    text: str
    score: float
    tokens: list[str]
    token_scores: list[float]


def continue_prompts(
    model: GeneratorHubInterface, prompts: Sequence[str], search: Search, *, batch_size: int = 8
) -> Iterator[Continuation]:
    """The best continuation of every prompt, in order.

    Without sampling, and with dropless routing, the result does not depend on ``batch_size``. With sampling each batch
    draws from one sequence of random numbers, started anew by ``search.seed``.

    Args:
        model: from ``MHMoELanguageModel.from_pretrained``.
        prompts: one line of text each; an empty one starts from the end mark alone.

    Raises:
        UserError: naming the prompt that has line breaks, unknown words or no room for a continuation.
    """
    if (search.top_k or 0) > len(model.tgt_dict):
        raise UserError(f"--top-k ({search.top_k}) must be at most {len(model.tgt_dict)}, the words of the dictionary")
    longest = min(search.max_len_b, model.models[0].max_decoder_positions() - 1)
    encoded = [_encode(model, prompt, longest) for prompt in prompts]
    options = SimpleNamespace(beam=search.beam, max_len_b=search.max_len_b, temperature=search.temperature)
    generator = model.task.build_generator(model.models, options)
    if search.sampling:
        generator.search = PromptSampling(model.tgt_dict, search.top_k or -1, search.top_p or -1.0)
    for start in tracked(range(0, len(prompts), batch_size), "generate", "batches"):
        if search.sampling:
            torch.manual_seed(search.seed)
        batch = encoded[start : start + batch_size]
        dataset = model.task.build_dataset_for_inference(batch, [len(tokens) for tokens in batch])
        sample = dataset.collater([dataset[index] for index in range(len(batch))])
        sample = utils.apply_to_sample(lambda tensor: tensor.to(model.device), sample)
        hypotheses = model.task.inference_step(generator, model.models, sample)
        for prompt, (best, *_) in zip(prompts[start:], hypotheses):
            tokens = best["tokens"]
            words = [model.tgt_dict[int(token)] for token in tokens]
            score, scores = float(best["score"]), best["positional_scores"].tolist()
            yield Continuation(prompt, model.decode(tokens), score, words, scores)


def _encode(model: GeneratorHubInterface, prompt: str, longest: int) -> Tensor:
    shown = repr(prompt if len(prompt) <= 40 else prompt[:37] + "...")
    if len(prompt.splitlines()) > 1:
        raise UserError(f"prompt {shown} has line breaks: a prompt is one line, since the end of a line ends the text")
    tokens = model.encode(prompt)
    length = len(tokens) - 1  # without the end mark
    if length >= longest:
        raise UserError(
            f"prompt {shown} has {length} tokens and must have fewer than {longest}: --max-len-b, or one less than the "
            "model's positions, counts the whole text"
        )
    if tokens.eq(model.src_dict.unk()).any():
        raise UserError(f"prompt {shown} has words that the dictionary lacks: {model.string(tokens)}")
    return tokens


def cut_at(text: str, stops: Iterable[str]) -> str | None:
    """The text before its first stop string; None if there is none in it."""
    starts = [start for start in (text.find(stop) for stop in stops if stop) if start >= 0]
    return text[: min(starts)] if starts else None


def next_logits(decoder: Any, tokens: Tensor, state: dict) -> Tensor:
    """Returns float32 logits ``(B, vocabulary)`` of the token after ``(B, S)`` tokens.

    Args:
        decoder: of a language model.
        state: what earlier calls computed; at first ``{"is_first_step": True}``. Later calls compute the last token.
    """
    features, _ = decoder(tokens, incremental_state=state, features_only=True)
    state["is_first_step"] = False
    with decoder.autocast(features.device.type):
        return decoder.output_layer(features[:, -1]).float()


class StopDecoder:
    """Greedy decoding or sampling until a stop string, in batches: what ``generate_until`` of lm-eval asks for.

    fairseq's generator takes every ``</s>`` for the end of a text, those of a prompt's lines too, and knows no stop
    strings. This decoder takes prompts of several lines and stops each row as soon as it may: also at ``</s>``, which
    for these models is both the end of a line and the end of a text.

    Args:
        model: from ``open_text_model``.
        search: how to choose the next token; its ``max_len_b`` and ``seed`` are not used: random numbers are torch's,
            as lm-eval's ``--seed`` left them.
        stops: strings that end a continuation; they are left out of the result.
        max_tokens: most tokens of a continuation.

    Raises:
        UserError: if ``search`` has several beams.
    """

    def __init__(
        self, model: GeneratorHubInterface, search: Search, stops: Sequence[str] = (), max_tokens: int = 256
    ) -> None:
        if search.beam != 1:
            raise UserError(f"num_beams ({search.beam}) must be 1: use mhmoe generate for beam search")
        self.model = model
        self.decoder = model.models[0].decoder.eval()
        self.dictionary = model.tgt_dict
        self.search, self.stops, self.max_tokens = search, stops, max_tokens
        self.sampling = PromptSampling(self.dictionary, search.top_k or -1, search.top_p or -1.0)

    @torch.no_grad()
    def continue_prompts(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """The continuation of every prompt, without the prompt and without what ended it.

        It is decoded alone, as lm-eval decodes it: under SentencePiece its first word loses the space before it.

        Args:
            prompts: ids, the leading symbol included. Together with ``max_tokens`` they must fit the model.
        """
        length = max(map(len, prompts)) + self.max_tokens
        tokens = torch.full((len(prompts), length), self.dictionary.pad())
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt)
        found: list[str | None] = [None] * len(prompts)
        state: dict = {"is_first_step": True}
        for position in range(min(map(len, prompts)), length):
            chosen = self._next_tokens(tokens[:, :position], state)
            for row, prompt in enumerate(prompts):
                if position < len(prompt):
                    continue
                tokens[row, position] = chosen[row]
                if found[row] is None:
                    found[row] = self._finished(tokens[row, len(prompt) : position + 1])
            if None not in found:
                break
        return [text or "" for text in found]

    def _next_tokens(self, tokens: Tensor, state: dict) -> Tensor:
        """``(B, S)`` tokens so far -> ``(B,)`` next ones."""
        logits = next_logits(self.decoder, tokens.to(self.model.device), state)
        log_probs = (logits / self.search.temperature).log_softmax(-1)
        log_probs[:, self.dictionary.pad()] = -torch.inf
        if not self.search.sampling:
            return log_probs.argmax(1).cpu()
        return self.sampling.step(0, log_probs[:, None], None)[1][:, 0].cpu()

    def _finished(self, new: Tensor) -> str | None:
        """The text of a row's new tokens if they end it, else None."""
        ends = bool(new[-1] == self.dictionary.eos())
        text = self.model.decode(new[:-1] if ends else new)
        cut = cut_at(text, self.stops)
        return text if cut is None and (ends or len(new) >= self.max_tokens) else cut
