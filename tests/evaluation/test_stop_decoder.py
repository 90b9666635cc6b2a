"""Continuing ids until a stop string, with a model of which every next token is known."""

from types import SimpleNamespace

import pytest
import torch
from language_models import small_dictionary, small_model

from mhmoe_fairseq.evaluation.generation import Search, StopDecoder, cut_at


class Hub:
    """As much of fairseq's hub interface as the decoder needs; a text is its words."""

    def __init__(self, sharpness: float) -> None:
        self.src_dict = self.tgt_dict = small_dictionary()
        self.models = [small_model("dense_lm_tiny", dictionary=self.src_dict, tokens_per_sample=64).eval()]
        with torch.no_grad():
            self.models[0].decoder.output_projection.weight.mul_(sharpness)
        self.device = torch.device("cpu")
        self.task = SimpleNamespace(args=SimpleNamespace())

    def decode(self, tokens: torch.Tensor) -> str:
        return self.src_dict.string(tokens)


@pytest.fixture(scope="module")
def hub() -> Hub:
    return Hub(sharpness=20)


def argmax_words(hub: Hub, prompt: list[int], count: int) -> list[str]:
    """Greedy, with the whole text at every step."""
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits = hub.models[0](torch.tensor([tokens]))[0][0, -1]
        logits[hub.src_dict.pad()] = -torch.inf
        tokens.append(int(logits.argmax()))
    return [hub.src_dict[token] for token in tokens[len(prompt) :]]


def test_text_ends_before_the_first_stop_string_that_comes() -> None:
    stops = ("stop", "end", "")
    assert cut_at("on and on end and stop", stops) == "on and on "
    assert cut_at("on stop and end", stops) == "on "
    assert cut_at("on and on", stops) is None


@pytest.mark.parametrize("most", [1, 3, 6])
def test_a_continuation_has_as_many_tokens_as_it_may(hub: Hub, most: int) -> None:
    prompt = [2, 7, 12]
    expected = argmax_words(hub, prompt, most)
    assert hub.src_dict.eos_word not in expected
    [text] = StopDecoder(hub, Search(), max_tokens=most).continue_prompts([prompt])
    assert text.split() == expected


def test_temperature_flattens_what_is_drawn() -> None:
    """Against the probabilities of a full pass: a high temperature draws the likely tokens less often than they are."""
    hub, prompt = Hub(sharpness=0.6), [2, 9, 5]
    with torch.no_grad():
        logits = hub.models[0](torch.tensor([prompt]))[0][0, -1].float()
    logits[hub.src_dict.pad()] = -torch.inf
    for temperature in (0.5, 2.0):
        torch.manual_seed(0)
        search = Search(sampling=True, temperature=temperature)
        drawn = StopDecoder(hub, search)._next_tokens(torch.tensor([prompt] * 2000), {"is_first_step": True})
        found = torch.bincount(drawn, minlength=len(logits)) / len(drawn)
        assert (found - (logits / temperature).softmax(0)).abs().max() < 0.05
        assert (found - (logits * temperature).softmax(0)).abs().max() > 0.1
