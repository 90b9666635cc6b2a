"""Continue token ids until a stop string: what ``generate_until`` of lm-eval asks for.

fairseq's generator, behind ``mhmoe generate``, takes every ``</s>`` for the end of a text, those of a prompt's lines
too, and knows no stop strings. This decoder takes prompts of several lines and stops each row as soon as it may.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from fairseq.hub_utils import GeneratorHubInterface
from torch import Tensor

from ..common.errors import UserError
from .generation import PromptSampling, Search


@dataclass(frozen=True)
class Ending:
    """When a continuation ends.

    It also ends at ``</s>``, which for these models is both the end of a line and the end of a text: a stop string
    ``"\\n"`` adds nothing.

    Args:
        stops: strings that end it; they are left out of the result.
        max_tokens: its most tokens.

    Raises:
        UserError: naming the argument, its value and the rule.
    """

    stops: tuple[str, ...] = ()
    max_tokens: int = 256

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"max_gen_toks ({self.max_tokens}) must be at least 1")

    def cut(self, text: str) -> str | None:
        """The text before its first stop string; None if there is none in it."""
        places = [place for place in (text.find(stop) for stop in self.stops if stop) if place >= 0]
        return text[: min(places)] if places else None


class StopDecoder:
    """Greedy decoding or sampling, in batches.

    Args:
        model: from ``open_text_model``.
        search: how to choose the next token; its ``max_len_b`` and ``seed`` are not used: ``Ending`` limits the
            length, and random numbers are torch's, as lm-eval's ``--seed`` left them.

    Raises:
        UserError: if ``search`` has several beams.
    """

    def __init__(self, model: GeneratorHubInterface, search: Search) -> None:
        if search.beam != 1:
            raise UserError(f"num_beams ({search.beam}) must be 1: use mhmoe generate for beam search")
        self.model = model
        self.decoder = model.models[0].decoder.eval()
        self.dictionary = model.tgt_dict
        self.search = search
        self.sampling = PromptSampling(self.dictionary, search.top_k or -1, search.top_p or -1.0)

    @torch.no_grad()
    def continue_prompts(self, prompts: Sequence[Sequence[int]], ending: Ending) -> list[str]:
        """The continuation of every prompt, without the prompt and without what ended it.

        Args:
            prompts: ids, the leading symbol included. Together with ``ending.max_tokens`` they must fit the model.
        """
        length = max(map(len, prompts)) + ending.max_tokens
        tokens = torch.full((len(prompts), length), self.dictionary.pad())
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = torch.tensor(prompt)
        found: list[str | None] = [None] * len(prompts)
        state: dict = {"is_first_step": True}
        for position in range(min(map(len, prompts)), length):
            chosen = self._next_tokens(tokens[:, :position], state)
            state["is_first_step"] = False
            for row, prompt in enumerate(prompts):
                if position < len(prompt):
                    continue
                tokens[row, position] = chosen[row]
                if found[row] is None:
                    found[row] = self._finished(prompt, tokens[row, len(prompt) : position + 1].tolist(), ending)
            if None not in found:
                break
        return [text or "" for text in found]

    def _next_tokens(self, tokens: Tensor, state: dict) -> Tensor:
        """``(B, S)`` tokens so far -> ``(B,)`` next ones."""
        features, _ = self.decoder(tokens.to(self.model.device), incremental_state=state, features_only=True)
        with self.decoder.autocast(features.device.type):
            logits = self.decoder.output_layer(features[:, -1])
        log_probs = (logits.float() / self.search.temperature).log_softmax(-1)
        log_probs[:, self.dictionary.pad()] = -torch.inf
        if not self.search.sampling:
            return log_probs.argmax(1).cpu()
        return self.sampling.step(0, log_probs[:, None], None)[1][:, 0].cpu()

    def _finished(self, prompt: Sequence[int], new: list[int], ending: Ending) -> str | None:
        """The text of a row's new tokens if they end it, else None."""
        if new[-1] == self.dictionary.eos():
            text = self._text(prompt, new[:-1])
            cut = ending.cut(text)
            return text if cut is None else cut
        text = self._text(prompt, new)
        cut = ending.cut(text)
        return text if cut is None and len(new) >= ending.max_tokens else cut

    def _text(self, prompt: Sequence[int], new: list[int]) -> str:
        """What ``new`` adds to the prompt's last line: alone it would lose a space at its begin."""
        line: list[int] = []
        for token in prompt[1:]:  # the first is the leading symbol
            line = [] if token == self.dictionary.eos() else [*line, token]
        before, whole = (self.model.decode(torch.tensor(ids, dtype=torch.long)) for ids in (line, line + new))
        return whole[len(before) :] if whole.startswith(before) else self.model.decode(torch.tensor(new))
