"""Decoding step by step: as whole forward passes, in batches of any size, and up to a stop string."""

from types import SimpleNamespace

import pytest
import torch
from language_models import small_dictionary, small_model

from mhmoe_fairseq.evaluation.generation import Search, StopDecoder, continue_prompts, cut_at
from mhmoe_fairseq.models.language_model import MHMoELanguageModel

PROMPTS = ["The river", "", "The captain mends the garden near", "A", "The doctor crosses the old"]


@pytest.fixture(scope="module")
def model(trained_model):
    return MHMoELanguageModel.from_pretrained(str(trained_model.folder))


def full_log_probs(model, tokens):
    """Log-probabilities of every position from one forward pass over the whole text: ``(S, vocabulary)``."""
    eos = model.tgt_dict.eos()
    source = torch.cat([torch.tensor([eos]), tokens[:-1]])
    with torch.no_grad():
        return model.models[0](source[None])[0][0].log_softmax(-1)


def indices(model, continuation):
    return torch.tensor([model.tgt_dict.index(symbol) for symbol in continuation.tokens])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_decoding_is_the_argmax_of_full_passes(model, prompt):
    [found] = continue_prompts(model, [prompt], Search(max_len_b=40))
    tokens = indices(model, found)
    log_probs = full_log_probs(model, tokens)
    scores = torch.tensor(found.token_scores)
    torch.testing.assert_close(scores, log_probs.gather(1, tokens[:, None])[:, 0], rtol=0, atol=1e-5)
    assert found.score == pytest.approx(scores.mean().item(), abs=1e-5)
    start = len(model.encode(prompt)) - 1
    log_probs[:, model.tgt_dict.pad()] = -torch.inf
    log_probs[0, model.tgt_dict.eos()] = -torch.inf  # fairseq's --min-len 1
    free = slice(start, 40)  # at the length limit the end mark is forced
    assert len(tokens) > start + 1
    assert tokens[free].tolist() == log_probs.argmax(1)[free].tolist()
    assert found.text.startswith(prompt) and found.prompt == prompt


def test_a_trained_model_writes_its_language(model):
    [found] = continue_prompts(model, ["The river"], Search(max_len_b=60, beam=4))
    assert found.text.endswith(".") and found.tokens[-1] == "</s>"


@pytest.mark.parametrize("beam", [1, 4])
@pytest.mark.parametrize("batch_size", [2, 8])
def test_batches_equal_one_by_one(model, beam, batch_size):
    search = Search(beam=beam, max_len_b=30)
    together = list(continue_prompts(model, PROMPTS, search, batch_size=batch_size))
    alone = list(continue_prompts(model, PROMPTS, search, batch_size=1))
    assert [one.prompt for one in together] == PROMPTS
    for one, other in zip(together, alone):
        assert one.tokens == other.tokens and one.text == other.text
        assert one.token_scores == pytest.approx(other.token_scores, abs=1e-5)
        assert one.score == pytest.approx(other.score, abs=1e-5)


def test_beam_search_finds_no_worse_texts(model):
    greedy, beam = (list(continue_prompts(model, PROMPTS, Search(beam=beam, max_len_b=40))) for beam in (1, 6))
    assert sum(one.score for one in beam) > sum(one.score for one in greedy)


def test_sampling_follows_its_seed(model):
    texts = [
        [one.text for one in continue_prompts(model, PROMPTS, Search(sampling=True, seed=seed, max_len_b=30))]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_narrow_sampling_is_greedy(model, narrow):
    sampled = continue_prompts(model, PROMPTS, Search(sampling=True, max_len_b=30, **narrow))
    greedy = continue_prompts(model, PROMPTS, Search(max_len_b=30))
    assert [one.text for one in sampled] == [one.text for one in greedy]


def test_characters_outside_the_vocabulary_come_back(model):
    [found] = continue_prompts(model, ["The café über 東京"], Search(max_len_b=50))
    assert "<0xC3>" in found.tokens and found.text.startswith("The café über 東京")


def test_the_length_limit_counts_the_prompt(model):
    [found] = continue_prompts(model, ["The river"], Search(max_len_b=8))
    assert len(found.tokens) == 9 and found.tokens[-1] == "</s>"


def test_generation_changes_nothing_in_the_model(model):
    before = {name: value.clone() for name, value in model.models[0].state_dict().items()}
    list(continue_prompts(model, PROMPTS, Search(sampling=True, max_len_b=30)))
    assert all(torch.equal(value, before[name]) for name, value in model.models[0].state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam": 0}, r"--beam \(0\) must be at least 1"),
        ({"max_len_b": 0}, r"--max-len-b \(0\)"),
        ({"sampling": True, "top_k": 0}, r"--top-k \(0\)"),
        ({"sampling": True, "top_p": 1.5}, r"--top-p \(1.5\) must be in \(0, 1\]"),
        ({"sampling": True, "top_p": 0.5, "top_k": 3}, "--top-k and --top-p exclude"),
        ({"temperature": 0.0}, r"--temperature \(0.0\) must be positive"),
        ({"top_p": 0.5}, "--top-p needs --sampling"),
        ({"top_k": 5}, "--top-k needs --sampling"),
    ],
)
def test_impossible_searches_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Search(**options)


@pytest.mark.parametrize(
    ("prompts", "search", "batch_size", "message"),
    [
        (["The river", "one\ntwo"], Search(), 8, r"prompt 'one\\ntwo' has line breaks"),
        (
            ["The river", "The river " * 20],
            Search(),
            8,
            r"prompt 'The river .*' has \d+ tokens and must have fewer than 63",
        ),
        (["The river"], Search(max_len_b=4), 8, "must have fewer than 4: --max-len-b"),
        (["The river"], Search(sampling=True, top_k=5000), 8, r"--top-k \(5000\) must be at most"),
    ],
)
def test_impossible_prompts_are_refused_before_work(model, prompts, search, batch_size, message):
    with pytest.raises(ValueError, match=message):
        next(continue_prompts(model, prompts, search, batch_size=batch_size))


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
