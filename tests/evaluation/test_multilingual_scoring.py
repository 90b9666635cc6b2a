"""Models of several languages, with and without their languages' symbols, through the adapter and the probe."""

import json

import pytest
import torch
from console import train
from multilingual_data import SENTENCES, write_languages

from mhmoe_fairseq.checkpoints.open import open_text_model, was_trained_with
from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.evaluation.records import read_record
from mhmoe_fairseq.evaluation.scoring import TextScorer

pytestmark = pytest.mark.slow  # two trainings


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = write_languages(tmp_path_factory.mktemp("languages") / "data")
    (folder / "aligned").mkdir()
    # The dictionary has single characters, so the text has a space after each.
    sentences = zip(*(text.splitlines() for code, text in SENTENCES.items() if code in ("de", "en", "zh")))
    rows = [
        {
            "key": str(number),
            "text": {code: " ".join(line.replace(" ", "")) for code, line in zip(("de", "en", "zh"), lines)},
        }
        for number, lines in enumerate(sentences)
    ]
    (folder / "aligned" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def trained(data, folder, *flags):
    task = ("--task", "mhmoe_multilingual_language_modeling", "--batch-size", 16, "--tokens-per-sample", 128)
    train(data, folder, "mhmoe_lm_tiny", *task, "--decoder-embed-dim", 32, *flags, max_update=5)
    return folder


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    return trained(data, tmp_path_factory.mktemp("plain") / "saved")


@pytest.fixture(scope="module")
def with_symbols(data, tmp_path_factory):
    return trained(data, tmp_path_factory.mktemp("symbols") / "saved", "--mhmoe-language-token")


def log_prob(model, first, tokens):
    """Of ``tokens`` after the symbol ``first``, by one plain forward pass."""
    with torch.no_grad():
        log_probs = model.models[0](torch.tensor([[first, *tokens[:-1]]]))[0][0].log_softmax(-1)
    return log_probs.gather(1, torch.tensor(tokens)[:, None]).double().sum().item()


def test_symbols_lead_only_where_asked_for(plain, with_symbols):
    text = "A l l e M e n s c h e n"
    for folder, is_led in ((plain, False), (with_symbols, True)):
        model = open_text_model(folder, device="cpu")
        assert was_trained_with(model, "mhmoe_language_token") == is_led
        for language, symbol in ((None, "</s>"), ("de", "__de__"), ("zh", "__zh__")):
            scorer = TextScorer(model, language=language)
            tokens = scorer.encode(text)
            assert model.src_dict.unk() not in tokens and len(tokens) == 12
            [score] = scorer.score_all([([], tokens)])
            assert score.log_prob == pytest.approx(log_prob(model, model.src_dict.index(symbol), tokens), rel=1e-6)


def test_a_missing_language_is_told(with_symbols, caplog):
    pytest.importorskip("lm_eval", reason="lm-eval is an optional package")
    from mhmoe_fairseq.evaluation.lm_eval_model import MHMoEHarnessModel

    MHMoEHarnessModel(checkpoint=str(with_symbols), lang="de")
    assert "lang=CODE is missing" not in caplog.text
    MHMoEHarnessModel(checkpoint=str(with_symbols))
    assert "trained with --mhmoe-language-token: --model_args lang=CODE is missing" in caplog.text


def test_the_probe_uses_symbols_as_trained(plain, with_symbols, data, tmp_path):
    for folder, flags, symbols in ((plain, [], "--no-language-token"), (with_symbols, [], "--language-token")):
        records = []
        for words in (flags, [symbols]):
            file = tmp_path / "probe.json"
            command = ["--checkpoint", folder, "--data", data, "--pairs", "de-zh,zh-en", "--record", file, *words]
            assert main(["zero-shot", "probe", *map(str, command), "--cpu", "--min-characters", "1"]) == 0
            records.append(read_record(file).parts)
        assert records[0] == records[1] and records[0]["de-zh"]["PMI"].count == 6
