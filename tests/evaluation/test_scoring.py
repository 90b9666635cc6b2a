"""Scores equal those of fairseq's own scorer, in batches of any size, with newlines and over-long texts."""

from types import SimpleNamespace

import pytest
import torch
from fairseq.data import Dictionary
from harness import direct_scores
from language_models import small_model

from mhmoe_fairseq.checkpoints.open import open_text_model
from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.evaluation.scoring import TextScorer

TEXTS = [
    "The river follows the captain before dawn 7.",
    "The doctor",
    "The café über 東京, a letter",
    "The teacher mends the engine behind a quiet house 93. The farmer opens it.",
    "A",
]


@pytest.fixture(scope="module")
def model(trained_model):
    return open_text_model(trained_model.folder, device="cpu")


@pytest.fixture(scope="module")
def scorer(model):
    return TextScorer(model)


def test_whole_texts_equal_fairseqs_scores(model, scorer):
    found = scorer.score_all([([], scorer.encode(text)) for text in TEXTS])
    for text, score, hub in zip(TEXTS, found, model.score(TEXTS)):
        tokens = scorer.encode(text)
        assert tokens == hub["tokens"].tolist()
        assert score.log_prob == pytest.approx(direct_scores(model, tokens).sum().item(), rel=1e-6)
        assert score.log_prob == pytest.approx(hub["positional_scores"].double().sum().item(), rel=1e-6)
        assert score.num_tokens == len(tokens)


def test_newlines_are_line_ends(model, scorer):
    text = "The river follows.\n\nThe doctor\r\nopens it"
    eos = model.src_dict.eos()
    assert scorer.encode(text).count(eos) == 3
    [hub] = model.score([text], replace_newline_with_eos=True)
    assert scorer.encode(text) == hub["tokens"].tolist()
    [score] = scorer.score_all([([], scorer.encode(text))])
    assert score.log_prob == pytest.approx(hub["positional_scores"].double().sum().item(), rel=1e-6)
    assert scorer.encode("yes\n") == [*scorer.encode("yes"), eos] and scorer.encode("\n") == [eos]
    assert scorer.encode("") == []


def test_text_is_cleaned_as_the_corpora_are(model, scorer):
    assert scorer.encode(" The\u00a0cafe\u0301  waits ") == scorer.encode("The café waits")
    raw = TextScorer(model, clean=False).encode("The\u00a0river")
    assert model.src_dict.unk() not in scorer.encode("The\u00a0river") != raw


def test_words_that_the_dictionary_lacks_are_told_once(model, caplog):
    scorer = TextScorer(model)
    scorer.model = SimpleNamespace(encode=model.binarize, task=model.task, device=model.device)  # no tokenizer
    assert scorer.encode("xyzzy plugh") == [model.src_dict.unk()] * 2
    scorer.encode("xyzzy")
    assert [record.message for record in caplog.records if "<unk>" in record.message] == [
        "the text has words that the dictionary lacks, scored as <unk>: 'xyzzy plugh'"
    ]


@pytest.mark.parametrize(
    ("context", "continuation", "is_apart"),
    [
        ("The river follows", " the captain before", True),
        ("The river follows ", "the captain", True),
        ("The river.\nThe doctor", " opens", True),
        ("The river.\n", "The doctor", True),
        ("", "The doctor opens", True),
        ("The riv", "er follows", False),  # "river" has tokens of its own
    ],
)
def test_a_continuation_is_the_rest_of_the_whole_text(model, scorer, context, continuation, is_apart):
    pair = scorer.encode_pair(context, continuation)
    whole, known = scorer.encode(context + continuation), scorer.encode(context.rstrip())
    assert pair[0] + pair[1] == whole and pair[1]
    assert pair[0] == known[: len(pair[0])] and (pair[0] == known) == is_apart
    [score] = scorer.score_all([pair])
    assert score.log_prob == pytest.approx(direct_scores(model, whole)[len(pair[0]) :].sum().item(), rel=1e-6)


def test_nothing_to_score(scorer):
    for nothing in ("", "   ", "\t", "\ufeff"):
        with pytest.raises(UserError, match="has no token to score"):
            scorer.encode_pair("The river", nothing)
    assert scorer.score_all([([5], []), ([], [7])])[0] == (0.0, True, 0)


def test_batches_of_any_size_give_one_result(model):
    pairs = [([], TextScorer(model).encode(text[:end])) for text in TEXTS for end in (len(text), 12, 20)]
    alone = TextScorer(model, batch_size=1).score_all(pairs)
    for how in ({"batch_size": 8}, {"batch_tokens": 40}, {}):
        together = TextScorer(model, **how).score_all(pairs)
        for one, other in zip(alone, together):
            assert one.log_prob == pytest.approx(other.log_prob, rel=1e-6)
            assert one[1:] == other[1:]


def test_greedy_means_the_argmax_everywhere(model, scorer):
    tokens = scorer.encode("The river follows")
    source = [model.src_dict.eos(), *tokens]
    best = []
    for _ in range(3):
        with torch.no_grad():
            best.append(int(model.models[0](torch.tensor([source + best]))[0][0, -1].argmax()))
    other = best[:-1] + [best[-1] % 300 + 5]
    assert [score.is_greedy for score in scorer.score_all([(tokens, best), (tokens, other)])] == [True, False]


def test_overlong_contexts_are_cut_on_the_left(model):
    scorer = TextScorer(model, max_length=10)
    context, continuation = scorer.encode(TEXTS[3]), scorer.encode("The doctor")
    assert len(context) > 10 > len(continuation)
    [score] = scorer.score_all([(context, continuation)])
    kept = [*context, *continuation][-11:]
    with torch.no_grad():
        log_probs = model.models[0](torch.tensor([kept[:-1]]))[0].log_softmax(-1)[0]
    expected = log_probs.gather(1, torch.tensor(kept[1:])[:, None])[-len(continuation) :].double().sum()
    assert score.log_prob == pytest.approx(expected.item(), rel=1e-6)
    tokens = [scorer.leading_symbol, *context]
    assert scorer.prompt(TEXTS[3], 99) == tokens and scorer.prompt(TEXTS[3], 5) == tokens[-5:]


def test_every_token_of_an_overlong_text_is_predicted_once(model):
    scorer = TextScorer(model, max_length=9)
    tokens = [2, *range(5, 36)]
    windows = scorer.windows(tokens, 31)
    assert [token for window in windows for token in window.targets] == tokens[1:]
    assert windows[0].inputs == tokens[:9] and all(len(window.inputs) == 9 for window in windows)
    assert windows[-1].inputs == tokens[-10:-1] and len(windows[-1].targets) == 4
    [score] = scorer.score_all([([], tokens[1:])])
    parts = 0.0
    for window in windows:
        with torch.no_grad():
            log_probs = model.models[0](torch.tensor([window.inputs]))[0].log_softmax(-1)[0, -len(window.targets) :]
        parts += log_probs.gather(1, torch.tensor(window.targets)[:, None]).double().sum().item()
    assert score.log_prob == pytest.approx(parts, rel=1e-6) and score.num_tokens == 31


class TinyHub:
    """As much of fairseq's hub interface as scoring ids needs."""

    def __init__(self, arch: str, **flags: object) -> None:
        self.src_dict = Dictionary()
        for word in (*(f"w{number}" for number in range(40)), "__de__"):
            self.src_dict.add_symbol(word)
        self.models = [small_model(arch, dictionary=self.src_dict, tokens_per_sample=32, **flags)]
        self.tgt_dict, self.device = self.src_dict, torch.device("cpu")
        self.task = SimpleNamespace(args=SimpleNamespace())


@pytest.mark.parametrize(
    ("arch", "flags"),
    [
        ("dense_lm_tiny", {}),
        ("xmoe_lm_tiny", {}),
        ("mhmoe_lm_tiny", {}),
        ("mhmoe_lm_tiny", {"mhmoe_routing": "capacity"}),
        ("mhmoe_lm_tiny", {"mhmoe_precision": "bf16"}),
    ],
)
def test_models_of_every_kind_equal_fairseqs_scores(arch, flags):
    hub = TinyHub(arch, **flags)
    pairs = [([], [5, 9, 8, 30]), ([], [7] * 20), ([], [5, 9])]
    for (_, tokens), score in zip(pairs, TextScorer(hub).score_all(pairs)):
        assert score.log_prob == pytest.approx(
            direct_scores(hub, tokens).sum().item(), rel=1e-2 if "mhmoe_precision" in flags else 1e-6
        )


def test_the_padding_symbol_in_a_text_is_no_certain_token():
    hub = TinyHub("mhmoe_lm_tiny")
    padding = hub.src_dict.pad()
    [score] = TextScorer(hub).score_all([([5, 9], [padding])])
    with torch.no_grad():
        log_probs = hub.models[0](torch.tensor([[hub.src_dict.eos(), 5, 9]]))[0][0, -1].log_softmax(-1)
    assert score.log_prob == pytest.approx(log_probs[padding].item(), rel=1e-6) and not score.is_greedy


def test_a_language_symbol_leads_every_window():
    hub = TinyHub("mhmoe_lm_tiny")
    german = hub.src_dict.index("__de__")
    scorer = TextScorer(hub, language="de", max_length=6)
    assert all(window.inputs[0] == german for window in scorer.windows([german, *range(5, 25)], 20))
    scorer.encode = lambda text: [5, 9, 8]
    assert scorer.prompt("", 3) == [german, 9, 8]
    [led] = scorer.score_all([([], [5, 9, 8])])
    scorer.set_language(None)
    [plain] = scorer.score_all([([german], [5, 9, 8])])
    assert scorer.leading_symbol == hub.src_dict.eos()
    hub.task.args.add_bos_token = True
    assert TextScorer(hub).leading_symbol == hub.src_dict.bos()
    assert led.log_prob != pytest.approx(plain.log_prob, rel=1e-3)
    with pytest.raises(ValueError, match="lang fr: the dictionary has no __fr__"):
        scorer.set_language("fr")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"batch_size \(0\) must be at least 1"),
        ({"batch_tokens": 0}, r"batch_tokens \(0\)"),
        ({"max_length": 100}, r"max_length \(100\) must be at most 32, the model's positions"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TextScorer(TinyHub("dense_lm_tiny"), **options)
