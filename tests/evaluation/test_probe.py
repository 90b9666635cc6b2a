"""The cross-lingual probe: its questions, its scores against direct scoring, and the command."""

import json
import random

import pytest
from harness import direct_scores, line_ids

from mhmoe_fairseq.commands.main import main
from mhmoe_fairseq.evaluation.probe import Aligned, Item, make_items, probe, read_aligned, score_items
from mhmoe_fairseq.evaluation.records import read_record
from mhmoe_fairseq.evaluation.scoring import Score, TextScorer

_WORDS = "river farmer teacher engine garden letter winter captain window market forest doctor".split()


def aligned_text(count: int) -> list[Aligned]:
    """English and a German of its own: the words backwards."""
    draw = random.Random(0)
    found = []
    for number in range(count):
        words = draw.sample(_WORDS, 2 + number % 3)
        text = {"en": " ".join(words), "de": " ".join(word[::-1] for word in words)}
        found.append(Aligned(f"key{number:03}", {**text, "fr": text["en"]} if number % 2 else text))
    return found


def test_questions_have_one_answer_and_distractors_of_its_length():
    aligned = aligned_text(80)
    items = make_items(aligned, "en", "de", candidates=4)
    translation = {one.text["en"]: one.text["de"] for one in aligned}
    assert len(items) > 60
    for item in items:
        assert len(set(item.candidates)) == 4 and item.candidates[item.answer] == translation[item.context]
        assert max(map(len, item.candidates)) <= 2.5 * min(map(len, item.candidates))
    places = [item.answer for item in items]
    assert all(places.count(place) > 5 for place in range(4))


def test_questions_depend_on_the_seed_and_not_on_the_order_of_lines():
    aligned = aligned_text(80)
    first = make_items(aligned, "en", "de", most=20)
    assert make_items(aligned[::-1], "en", "de", most=20) == first and len(first) == 20
    assert make_items(aligned, "en", "de", most=20, seed=2) != first


def test_untranslated_short_and_repeated_sentences_are_left_out():
    aligned = aligned_text(80)
    with pytest.raises(
        ValueError, match="en-fr: 0 aligned sentences of at least 10 characters, but a question needs 4"
    ):
        make_items(aligned, "en", "fr")
    extra = [*aligned, Aligned("short", {"en": "river", "de": "revir"}), aligned[0]._replace(key="repeated")]
    assert make_items(extra, "en", "de") == make_items(aligned, "en", "de")


def right(metrics: dict) -> dict[str, int]:
    """Right answers, by the way to choose."""
    return {way: round(metric.value * metric.count / 100) for way, metric in metrics.items()}


def test_scores_and_choices_equal_direct_scoring(hub):
    items = make_items(aligned_text(30), "en", "de", candidates=3, most=6)
    scorer = TextScorer(hub)
    after, alone = score_items(scorer, items, "en", "de")
    by_length = by_pmi = 0
    for item, scores, before in zip(items, after, alone):
        per_token, gain = [], []
        for candidate, score, other in zip(item.candidates, scores, before):
            context, tokens = [*line_ids(hub, item.context), hub.src_dict.eos()], line_ids(hub, candidate)
            assert len(context) + len(tokens) <= 64
            conditional = direct_scores(hub, context + tokens)[len(context) :].sum().item()
            unconditional = direct_scores(hub, tokens).sum().item()
            assert score.log_prob == pytest.approx(conditional, rel=1e-6) and score.num_tokens == len(tokens)
            assert other.log_prob == pytest.approx(unconditional, rel=1e-6)
            per_token.append(conditional / len(tokens))
            gain.append(conditional - unconditional)
        by_length += max(per_token) == per_token[item.answer]
        by_pmi += max(gain) == gain[item.answer]
    assert right(probe(scorer, items, "en", "de")) == {"per token": by_length, "PMI": by_pmi}


def test_choices_by_length_and_by_gain(monkeypatch):
    """The right answer is the better per token and the worse in all; the other one gains more."""
    after, alone = [Score(-6.0, False, 6), Score(-3.0, False, 2)], [Score(-6.5, False, 6), Score(-9.0, False, 2)]
    monkeypatch.setattr("mhmoe_fairseq.evaluation.probe.score_items", lambda *_, **__: ([after], [alone]))
    item = Item("context", ("long", "short"), answer=0)
    assert right(probe(None, [item], "en", "de")) == {"per token": 1, "PMI": 0}


def test_no_distractor_is_another_translation_of_the_context():
    one, *others = aligned_text(6)
    twin = Aligned("twin", {"en": one.text["en"], "de": one.text["de"][::-1]})
    for seed in range(10):
        for item in make_items([one, twin, *others], "en", "de", seed=seed):
            assert len({one.text["de"], twin.text["de"]} & set(item.candidates)) < 2 or item.context != one.text["en"]


@pytest.fixture
def data(trained_model, tmp_path):
    """A folder as ``mhmoe prepare multilingual`` leaves it, as far as the probe reads it."""
    for name in ("dict.txt", "sentencepiece.model"):
        (tmp_path / name).write_bytes((trained_model.data / name).read_bytes())
    (tmp_path / "aligned").mkdir()
    lines = [json.dumps({"key": one.key, "text": one.text}) + "\n" for one in aligned_text(40)]
    (tmp_path / "aligned" / "test.jsonl").write_text("".join(lines), encoding="utf-8")
    return tmp_path


def test_the_command(trained_model, hub, data, capsys):
    flags = ["--checkpoint", str(trained_model.folder), "--data", str(data), "--cpu", "--max-items", "8"]
    words = [*flags, "--pairs", "en-de,de-en", "--precision", "fp32", "--record", str(data / "probe.json")]
    assert main(["zero-shot", "probe", *words]) == 0
    out = capsys.readouterr().out
    assert "Cross-lingual probe of our own, not XNLI" in out and "chance is 25.0" in out
    record = read_record(data / "probe.json")
    assert record.provenance["precision"] == "fp32"
    assert list(record.parts) == ["en-de", "de-en"] and "not XNLI" in record.settings["what"]
    for pair, metrics in record.parts.items():
        assert metrics["PMI"].count == 8 and metrics["PMI"].baselines == {"chance": 25.0}
        [row] = [line for line in out.splitlines() if line.startswith(f"| {pair} ")]
        assert f"{metrics['per token'].value:.1f} ± {metrics['per token'].stderr:.1f}" in row
    assert record.main.value == sum(record.values("per token").values()) / 2
    expected = make_items(read_aligned(data / "aligned" / "test.jsonl"), "en", "de", most=8)
    assert probe(TextScorer(hub), expected, "en", "de") == record.parts["en-de"]


def test_bad_input_is_one_line(trained_model, data, capsys):
    aligned = data / "aligned" / "test.jsonl"
    good = aligned.read_text(encoding="utf-8")
    flags = ["--checkpoint", str(data), "--data", str(data)]  # a folder without one
    for words, text, message in (
        (["--split", "valid"], good, "--data: no such file"),
        (["--pairs", "en-en"], good, "--pairs en-en: must be two different language codes"),
        (["--pairs", "en-xx"], good, "--pairs xx: no such language"),
        (["--pairs", "en-de,en-de"], good, "--pairs en-de: given twice"),
        (["--pairs", "en-ru"], good, "en-ru: 0 aligned sentences"),
        (["--candidates", "1"], good, "--candidates (1) must be at least 2"),
        (["--max-items", "0"], good, "--max-items (0) must be at least 1"),
        ([], good + "{\n", "test.jsonl:41: not valid JSON"),
        ([], good + '{"text": {}}\n', "test.jsonl:41: needs a JSON object with a field 'key'"),
        ([], good + '{"key": "a", "text": {"en": 1}}\n', "test.jsonl:41: field 'text' must be an object of texts"),
        ([], "", "test.jsonl: no aligned text in it"),
        (["--pairs", "en-de"], good, "no model.pt or checkpoint_best.pt or checkpoint_last.pt in "),
    ):
        aligned.write_text(text, encoding="utf-8")
        assert main(["zero-shot", "probe", *flags, *words]) == 2
        err = capsys.readouterr().err
        assert err.startswith("mhmoe zero-shot: error: ") and message in err and err.count("\n") == 1, err
