"""All caption metrics of a set together, and what is said of those that cannot be computed."""

from __future__ import annotations

import importlib.util
import shutil

import pytest

from mhmoe_fairseq.commands.caption import describe
from mhmoe_fairseq.metrics.caption_baseline import best_constant_caption
from mhmoe_fairseq.metrics.captions import CiderD, rouge_l, tokenize
from mhmoe_fairseq.metrics.captions import java as java_caption_metrics
from mhmoe_fairseq.metrics.captions.report import CaptionScores, score_captions

REFERENCES = {
    30: ["A man rides a wave on his surfboard.", "A surfer on top of a wave."],
    10: ["Two dogs play with a red ball."],
    20: ["A black cat's bed.", "The cat is asleep, in its bed."],
}
CAPTIONS = {10: "two dogs play with a ball", 20: "A cat's bed!", 30: "a man rides a wave on a surfboard"}


def test_words_are_compared_not_their_case_and_punctuation():
    scores = score_captions(CAPTIONS, REFERENCES, with_java=False)
    plain = {image: " ".join(tokenize(caption)) for image, caption in CAPTIONS.items()}
    assert score_captions(plain, REFERENCES, with_java=False) == scores
    words = {image: [tokenize(caption) for caption in captions] for image, captions in REFERENCES.items()}
    cider = CiderD(list(words.values()))
    expected = [cider.score(place, tokenize(CAPTIONS[image])) for place, image in enumerate(words)]
    assert scores.cider == pytest.approx(100 * sum(expected) / 3)
    assert scores.rouge_l == pytest.approx(
        100 * sum(rouge_l(tokenize(CAPTIONS[image]), words[image]) for image in words) / 3
    )
    assert (scores.images, scores.references) == (3, 5)
    assert 0 < scores.bleu[3] < scores.bleu[0] < 100


def test_missing_captions_and_references_are_named():
    for changes, message in (
        ({10: None}, "1 of 3 images have no caption, first image_id 10"),
        ({40: "x"}, "image_id 40"),
    ):
        captions = {image: text for image, text in {**CAPTIONS, **changes}.items() if text is not None}
        with pytest.raises(ValueError, match=message):
            score_captions(captions, REFERENCES, with_java=False)
    with pytest.raises(ValueError, match="no image"):
        score_captions({}, {}, with_java=False)


def test_what_java_would_compute_is_absent_with_a_reason(monkeypatch):
    monkeypatch.setattr(java_caption_metrics.shutil, "which", lambda name: None)
    scores = score_captions(CAPTIONS, REFERENCES)
    assert (scores.meteor, scores.spice) == (None, None) and set(scores.absent) == {"meteor", "spice"}
    reasons = {
        "there is no java on this machine",
        "pycocoevalcap is not installed: pip install 'mhmoe-fairseq[captions]'",
    }
    assert set(scores.absent.values()) <= reasons
    shown = describe(scores)
    assert "METEOR: absent, " in shown and "SPICE: absent, " in shown and "METEOR 0" not in shown


def test_the_size_of_the_set_is_said():
    shown = describe(CaptionScores(3, 5, (50.0, 40.0, 30.0, 20.0), 60.0, 120.5, meteor=29.3))
    assert shown.splitlines() == [
        "scored on 3 images with 5 reference captions, times 100:",
        "BLEU-1 50.00, BLEU-2 40.00, BLEU-3 30.00, BLEU-4 20.00, METEOR 29.30, ROUGE-L 60.00, CIDEr 120.50",
    ]


def test_a_java_program_that_fails_is_a_reason_too():
    class Broken:
        def compute_score(self, truth, results):
            raise BrokenPipeError("the program ended")

    with pytest.raises(java_caption_metrics.Unavailable, match="BrokenPipeError: the program ended"):
        java_caption_metrics._run(Broken, [["a"]], [[["a"]]])


def test_the_best_caption_for_all_images():
    """Against scoring every candidate on every image."""
    training = {1: ["a red cat", "a cat"], 2: ["a red dog"], 3: ["a blue dog", "a red dog runs"], 4: ["two red birds"]}
    candidates = [caption for captions in training.values() for caption in captions]
    totals = {
        caption: score_captions(dict.fromkeys(training, caption), training, with_java=False).cider
        for caption in candidates
    }
    assert best_constant_caption(training) == max(totals, key=totals.get)
    assert len(set(totals.values())) > 3


@pytest.mark.slow
def test_meteor_is_that_of_pycocoevalcap():
    if importlib.util.find_spec("pycocoevalcap") is None or shutil.which("java") is None:
        pytest.skip("METEOR needs pycocoevalcap (extra captions) and java")
    scores = score_captions(CAPTIONS, REFERENCES)
    assert 10 < scores.meteor < 100  # METEOR 1.5 reaches 100 for a caption that is a reference
    exact = score_captions({image: captions[0] for image, captions in REFERENCES.items()}, REFERENCES)
    assert exact.meteor == pytest.approx(100)
    assert "Stanford CoreNLP 3.6.0" in scores.absent["spice"] or scores.spice is not None
