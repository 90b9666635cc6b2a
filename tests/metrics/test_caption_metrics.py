"""All caption metrics of a set together, and what is said of those that cannot be computed."""

import importlib.util
import shutil

import pytest

from mhmoe_fairseq.metrics.baselines import best_constant_caption
from mhmoe_fairseq.metrics.captions import CiderD, coco, rouge_l, score_captions, tokenize

REFERENCES = {
    30: ["A man rides a wave on his surfboard.", "A surfer on top of a wave."],
    10: ["Two dogs play with a red ball."],
    20: ["A black cat's bed.", "The cat is asleep, in its bed."],
}
CAPTIONS = {10: "two dogs play with a ball", 20: "A cat's bed!", 30: "a man rides a wave on a surfboard"}


def test_words_are_compared_not_their_case_and_punctuation():
    scores, absent = score_captions(CAPTIONS, REFERENCES, with_java=False)
    plain = {image: " ".join(tokenize(caption)) for image, caption in CAPTIONS.items()}
    assert score_captions(plain, REFERENCES, with_java=False) == (scores, absent)
    words = {image: [tokenize(caption) for caption in captions] for image, captions in REFERENCES.items()}
    cider = CiderD(list(words.values()))
    expected = [cider.score(place, tokenize(CAPTIONS[image])) for place, image in enumerate(words)]
    assert scores["CIDEr"] == pytest.approx(100 * sum(expected) / 3)
    assert scores["ROUGE-L"] == pytest.approx(
        100 * sum(rouge_l(tokenize(CAPTIONS[image]), words[image]) for image in words) / 3
    )
    assert 0 < scores["BLEU-4"] < scores["BLEU-1"] < 100 and next(iter(scores)) == "CIDEr"
    assert absent == {"METEOR": "not asked for", "SPICE": "not asked for"}


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
    monkeypatch.setattr(coco.shutil, "which", lambda name: None)
    scores, absent = score_captions(CAPTIONS, REFERENCES)
    assert set(absent) == {"METEOR", "SPICE"} and not absent.keys() & scores.keys()
    reasons = {
        "there is no java on this machine",
        "pycocoevalcap is not installed: pip install 'mhmoe-fairseq[captions]'",
    }
    assert set(absent.values()) <= reasons


def test_a_java_program_that_fails_is_a_reason_too():
    class Broken:
        def compute_score(self, truth, results):
            raise BrokenPipeError("the program ended")

    with pytest.raises(coco.Unavailable, match="BrokenPipeError: the program ended"):
        coco._run(Broken, [["a"]], [[["a"]]])


def test_the_best_caption_for_all_images():
    """Against scoring every candidate on every image."""
    training = {1: ["a red cat", "a cat"], 2: ["a red dog"], 3: ["a blue dog", "a red dog runs"], 4: ["two red birds"]}
    candidates = [caption for captions in training.values() for caption in captions]
    totals = {
        caption: score_captions(dict.fromkeys(training, caption), training, with_java=False)[0]["CIDEr"]
        for caption in candidates
    }
    assert best_constant_caption(training) == max(totals, key=totals.get)
    assert len(set(totals.values())) > 3


@pytest.mark.slow
def test_meteor_is_that_of_pycocoevalcap():
    if importlib.util.find_spec("pycocoevalcap") is None or shutil.which("java") is None:
        pytest.skip("METEOR needs pycocoevalcap (extra captions) and java")
    scores, absent = score_captions(CAPTIONS, REFERENCES)
    assert 10 < scores["METEOR"] < 100  # METEOR 1.5 reaches 100 for a caption that is a reference
    exact, _ = score_captions({image: captions[0] for image, captions in REFERENCES.items()}, REFERENCES)
    assert exact["METEOR"] == pytest.approx(100)
    assert "SPICE" in scores or "Stanford CoreNLP 3.6.0" in absent["SPICE"]
