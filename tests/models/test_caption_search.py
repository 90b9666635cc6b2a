"""Captions: beam search against exhaustive and step-by-step search, token by token as the whole at once."""

import itertools
import math

import pytest
import torch
from beit3_models import FAMILIES, beit3_batch, small_beit3

from mhmoe_fairseq.models.captions import CaptionSearch, Specials, search_captions

BOS, PAD, EOS, UNK, MASK = 0, 1, 2, 3, 8
WORDS = (4, 5, 6, 7)
SPECIALS = Specials(BOS, EOS, (BOS, PAD, UNK, MASK))
SIZE = 9


class ToyState:
    """Rows of (image, tokens so far)."""

    def __init__(self, images):
        self.rows = [(int(image), ()) for image in images.flatten(1)[:, 0]]

    def reorder(self, index):
        self.rows = [self.rows[place] for place in index.tolist()]


class ToyWriter:
    """Its logits are random numbers drawn from the image and all tokens so far."""

    def __init__(self, end_bonus=0.0):
        self.end_bonus = end_bonus
        self.calls = 0

    def start_captions(self, images):
        return ToyState(images)

    def next_token_logits(self, state, tokens):
        self.calls += 1
        state.rows = [(image, (*text, token)) for (image, text), token in zip(state.rows, tokens.tolist())]
        return torch.stack([self.logits(image, text) for image, text in state.rows])

    def logits(self, image, text):
        seed = image
        for token in text:
            seed = (seed * 31 + token + 1) % 1_000_003
        logits = 2 * torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))
        logits[EOS] += self.end_bonus
        return logits

    def log_prob(self, image, tokens):
        """Of a caption with its end."""
        text, total = (BOS,), 0.0
        for token in (*tokens, EOS):
            total += float(self.logits(image, text).log_softmax(-1)[token])
            text = (*text, token)
        return total


def images(numbers):
    return torch.tensor(numbers, dtype=torch.float)[:, None, None, None].expand(-1, 3, 2, 2)


def exhaustive(model, image, search):
    """The best of all captions that there can be."""
    captions = [words for length in range(1, search.max_len) for words in itertools.product(WORDS, repeat=length)]
    score = {words: model.log_prob(image, words) / (len(words) + 1) ** search.length_penalty for words in captions}
    best = max(score, key=score.get)
    return best, score[best]


def one_by_one(model, image, search):
    """Beam search for one image with lists, every hypothesis scored anew from its first token."""
    live, ended = [((), 0.0)], []
    for length in range(1, search.max_len + 1):
        candidates = []
        for words, total in live:
            log_probs = model.logits(image, (BOS, *words)).log_softmax(-1)
            allowed = (EOS,) if length == search.max_len else WORDS if length == 1 else (*WORDS, EOS)
            candidates += [((*words, token), total + float(log_probs[token])) for token in allowed]
        candidates.sort(key=lambda candidate: -candidate[1])
        ended += [
            (words[:-1], total / length**search.length_penalty)
            for words, total in candidates[: search.beam]
            if words[-1] == EOS
        ]
        live = [candidate for candidate in candidates if candidate[0][-1] != EOS][: search.beam]
        if len(ended) >= search.beam:
            break
    return max(ended, key=lambda found: found[1])


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.0, 2.0])
def test_a_beam_as_wide_as_the_tree_finds_the_best_of_all_captions(penalty):
    search = CaptionSearch(beam=64, length_penalty=penalty, max_len=4)
    model = ToyWriter()
    found = search_captions(model, images(range(6)), search, SPECIALS)
    for image, caption in enumerate(found):
        words, score = exhaustive(model, image, search)
        assert caption.tokens == words
        assert caption.score == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize("beam", [1, 2, 3, 5])
@pytest.mark.parametrize("end_bonus", [-2.0, 0.0, 2.0])
def test_a_narrow_beam_does_what_a_search_with_lists_does(beam, end_bonus):
    search = CaptionSearch(beam=beam, length_penalty=0.6, max_len=8)
    model = ToyWriter(end_bonus)
    found = search_captions(model, images(range(20)), search, SPECIALS)
    for image, caption in enumerate(found):
        words, score = one_by_one(model, image, search)
        assert (caption.tokens, caption.score) == (words, pytest.approx(score, abs=1e-5))
    assert len({len(caption.tokens) for caption in found}) > 1


def test_a_caption_does_not_depend_on_the_other_images_of_its_batch():
    search = CaptionSearch(beam=3, max_len=8)
    together = search_captions(ToyWriter(), images(range(10)), search, SPECIALS)
    alone = [search_captions(ToyWriter(), images([image]), search, SPECIALS)[0] for image in range(10)]
    assert [caption.tokens for caption in together] == [caption.tokens for caption in alone]


def test_the_search_stops_when_told_and_not_before():
    """A rank that is done goes on with the others; its result stays."""
    search = CaptionSearch(beam=2, max_len=9)
    alone, with_others = ToyWriter(end_bonus=4.0), ToyWriter(end_bonus=4.0)
    expected = search_captions(alone, images(range(3)), search, SPECIALS)
    told = []
    found = search_captions(with_others, images(range(3)), search, SPECIALS, lambda is_done: bool(told.append(is_done)))
    assert with_others.calls == search.max_len > alone.calls
    assert told == [False] * (alone.calls - 1) + [True] * (search.max_len + 1 - alone.calls)
    assert found == expected


def test_the_longest_captions_end_at_the_last_place():
    search = CaptionSearch(beam=2, max_len=3)
    found = search_captions(ToyWriter(end_bonus=-30.0), images(range(4)), search, SPECIALS)
    assert [len(caption.tokens) for caption in found] == [2] * 4
    assert all(math.isfinite(caption.score) for caption in found)


def test_a_model_that_gives_no_numbers_gets_empty_captions():
    model = ToyWriter(end_bonus=math.nan)
    found = search_captions(model, images(range(2)), CaptionSearch(max_len=4), SPECIALS)
    assert found == [((), -math.inf)] * 2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"beam": 0}, r"--beam \(0\) must be at least 1"),
        ({"length_penalty": -0.1}, r"--length-penalty \(-0.1\) must be in \[0, 100\]"),
        ({"length_penalty": math.nan}, "--length-penalty"),
        ({"length_penalty": 1e9}, "--length-penalty"),
        ({"max_len": 1}, r"--max-len \(1\) must be at least 2"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        CaptionSearch(**changes)


def model_of(arch, **flags):
    return small_beit3(arch, encoder_layers=3, moe_freq=0 if arch.startswith("dense") else 1, **flags).eval()


def images_of(rows, seed=0):
    return beit3_batch("image", [1] * rows, seed=seed)["images"].float()


def tokens_of(rows, length, seed=0):
    tokens = torch.randint(4, 44, (rows, length), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0] = 0
    return tokens


def whole(model, images, tokens):
    """The scores of what follows ``tokens``, from the sequence with a mask at its end."""
    masks = torch.full((len(tokens), 1), model.dictionary.index("<mask>"))
    features, _ = model(text_tokens=torch.cat([tokens, masks], dim=1), images=images, attention="caption")
    return model.text_logits(features[:, -1])


@pytest.mark.parametrize("experts", ["shared", "separate"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_step_equals_the_whole_sequence(family, experts):
    model = model_of(f"{family}_beit3_tiny", mhmoe_modality_experts=None if family == "dense" else experts)
    images, tokens = images_of(3), tokens_of(3, 11)
    state = model.start_captions(images)
    for step in range(11):
        scores = model.next_token_logits(state, tokens[:, step])
        torch.testing.assert_close(scores, whole(model, images, tokens[:, : step + 1]), rtol=0, atol=1e-5)
    assert state.num_tokens == 11
    with pytest.raises(ValueError, match="a text of 13 tokens; --max-text-length is 12"):
        model.next_token_logits(state, tokens[:, 0])


@torch.no_grad()
def test_rows_follow_the_beam():
    model = model_of("mhmoe_beit3_tiny")
    images, tokens = images_of(2), tokens_of(2, 3)
    state = model.start_captions(images)
    model.next_token_logits(state, tokens[:, 0])
    model.next_token_logits(state, tokens[:, 1])
    rows = torch.tensor([1, 1, 0])  # two hypotheses of the second image, one of the first
    state.reorder(rows)
    new = torch.tensor([9, 10, 11])
    scores = model.next_token_logits(state, new)
    sequences = torch.cat([tokens[rows, :2], new[:, None]], dim=1)
    torch.testing.assert_close(scores, whole(model, images[rows], sequences), rtol=0, atol=1e-5)


@torch.no_grad()
def test_images_expand_before_the_first_token():
    model = model_of("dense_beit3_tiny")
    images = images_of(2)
    state = model.start_captions(images)
    rows = torch.tensor([0, 0, 1, 1])
    state.reorder(rows)
    begin = torch.zeros(4, dtype=torch.long)
    scores = model.next_token_logits(state, begin)
    torch.testing.assert_close(scores, whole(model, images[rows], begin[:, None]), rtol=0, atol=1e-5)


def test_steps_keep_no_graph_and_leave_the_model_as_it_is():
    model = model_of("mhmoe_beit3_tiny")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = model.start_captions(images_of(1))
    assert not model.next_token_logits(state, torch.tensor([0])).requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
