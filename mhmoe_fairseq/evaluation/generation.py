"""Continue prompts with a trained language model.

A thin layer on fairseq's ``GeneratorHubInterface``: prompts are checked before the first is decoded, batched, and
come back in order, each with its score.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import fairseq.search
import torch
from fairseq import utils
from fairseq.hub_utils import GeneratorHubInterface
from fairseq.sequence_generator import SequenceGenerator
from torch import Tensor

from ..common.errors import UserError


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
        if self.top_k is not None and self.top_p is not None:
            raise UserError("--top-k and --top-p exclude each other")
        if not self.sampling and (self.top_k is not None or self.top_p is not None):
            raise UserError(f"--{'top-k' if self.top_k is not None else 'top-p'} needs --sampling")


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
        prompt: as given.
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
    if batch_size < 1:
        raise UserError(f"--batch-size ({batch_size}) must be at least 1")
    if (search.top_k or 0) > len(model.tgt_dict):
        raise UserError(f"--top-k ({search.top_k}) must be at most {len(model.tgt_dict)}, the words of the dictionary")
    longest = min(search.max_len_b, model.models[0].max_decoder_positions() - 1)
    encoded = [_encode(model, prompt, longest) for prompt in prompts]
    generator = _build_generator(model, search)
    for start in range(0, len(prompts), batch_size):
        if search.sampling:
            torch.manual_seed(search.seed)
        batch = slice(start, start + batch_size)
        found = model.task.inference_step(generator, model.models, _batch(model, encoded[batch]))
        for prompt, hypotheses in zip(prompts[batch], found):
            yield _continuation(model, prompt, hypotheses[0])


def _build_generator(model: GeneratorHubInterface, search: Search) -> SequenceGenerator:
    options = SimpleNamespace(beam=search.beam, max_len_b=search.max_len_b, temperature=search.temperature)
    generator = model.task.build_generator(model.models, options)
    if search.sampling:
        generator.search = PromptSampling(model.tgt_dict, search.top_k or -1, search.top_p or -1.0)
    return generator


def _batch(model: GeneratorHubInterface, encoded: list[Tensor]) -> dict[str, Any]:
    dataset = model.task.build_dataset_for_inference(encoded, [len(tokens) for tokens in encoded])
    sample = dataset.collater([dataset[index] for index in range(len(encoded))])
    return utils.apply_to_sample(lambda tensor: tensor.to(model.device), sample)


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


def _continuation(model: GeneratorHubInterface, prompt: str, hypothesis: dict[str, Tensor]) -> Continuation:
    tokens = hypothesis["tokens"]
    return Continuation(
        prompt=prompt,
        text=model.decode(tokens),
        score=float(hypothesis["score"]),
        tokens=[model.tgt_dict[int(token)] for token in tokens],
        token_scores=hypothesis["positional_scores"].tolist(),
    )
