"""Caption metrics by hand and against pycocoevalcap, their files, and the words of captions."""

import importlib
import importlib.util
import json
import math
import random
import shutil
from types import SimpleNamespace

import pytest

from mhmoe_fairseq.metrics.caption_words import tokenize
from mhmoe_fairseq.metrics.captions import (
    CiderD,
    best_constant_caption,
    bleu,
    read_ground_truth,
    rouge_l,
    score_captions,
)

HAS_COCO = importlib.util.find_spec("pycocoevalcap") is not None

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
    expected = [cider.score(index, tokenize(CAPTIONS[image])) for index, image in enumerate(words)]
    assert scores["CIDEr"] == pytest.approx(100 * sum(expected) / 3)
    assert scores["ROUGE-L"] == pytest.approx(
        100 * sum(rouge_l(tokenize(CAPTIONS[image]), words[image]) for image in words) / 3
    )
    assert 0 < scores["BLEU-4"] < scores["BLEU-1"] < 100 and next(iter(scores)) == "CIDEr"
    assert absent == {"METEOR": "not asked for", "SPICE": "not asked for"}
    # The unit of papers' tables, where 120.5 is pycocoevalcap's 1.205: the only reference itself has 10 there.
    alone = {image: captions[:1] for image, captions in REFERENCES.items()}
    best, _ = score_captions({image: of[0] for image, of in alone.items()}, alone, with_java=False)
    assert (best["CIDEr"], best["BLEU-4"]) == pytest.approx((1000, 100))


def test_what_java_would_compute_is_absent_with_a_reason(monkeypatch, tmp_path):
    class Broken:
        def compute_score(self, truth, results):
            raise BrokenPipeError("the program ended")

    def absent():
        scores, reasons = score_captions(CAPTIONS, REFERENCES)
        assert set(reasons) == {"METEOR", "SPICE"} and not reasons.keys() & scores.keys()
        return list(reasons.values())

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert absent() == ["pycocoevalcap is not installed: pip install 'mhmoe-fairseq[captions]'"] * 2
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert absent() == ["there is no java on this machine"] * 2
    monkeypatch.setattr(shutil, "which", lambda name: name)
    package = SimpleNamespace(__file__=str(tmp_path / "x.py"), Meteor=Broken, Spice=Broken)
    monkeypatch.setattr(importlib, "import_module", lambda name: package)
    failed = "its program failed (BrokenPipeError: the program ended)"
    jars = ["stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"]
    lacks = f"pycocoevalcap/spice/lib lacks {' and '.join(jars)} of Stanford CoreNLP 3.6.0"
    assert absent() == [failed, lacks]
    (tmp_path / "lib").mkdir()
    for jar in jars:
        (tmp_path / "lib" / jar).touch()
    assert absent() == [failed, failed]


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


@pytest.mark.parametrize("images", [3, 4, 5, 8, 9])
def test_as_many_images_as_are_said(images, monkeypatch):
    monkeypatch.setattr("mhmoe_fairseq.metrics.captions._MOST_IMAGES", 4)
    used = []
    real = CiderD.__init__
    monkeypatch.setattr(CiderD, "__init__", lambda self, of: (used.append(len(of)), real(self, of))[1])
    best_constant_caption({image: [f"a cat {image}"] for image in range(images)})
    assert used == [len(range(0, images, -(-images // 4)))] and used[0] <= 4


@pytest.mark.slow
def test_meteor_is_that_of_pycocoevalcap():
    if not HAS_COCO or shutil.which("java") is None:
        pytest.skip("METEOR needs pycocoevalcap (extra captions) and java")
    scores, absent = score_captions(CAPTIONS, REFERENCES)
    assert 10 < scores["METEOR"] < 100  # METEOR 1.5 reaches 100 for a caption that is a reference
    exact, _ = score_captions({image: captions[0] for image, captions in REFERENCES.items()}, REFERENCES)
    assert exact["METEOR"] == pytest.approx(100)
    assert "SPICE" in scores or "Stanford CoreNLP 3.6.0" in absent["SPICE"]


# An image each: the model's caption, then the references.
ROWS = [
    ("a man riding a wave on a surfboard", "a man rides a wave on his surfboard", "a surfer on top of a wave",
     "the man is surfing in the ocean"),
    ("two dogs play with a red ball", "two dogs are playing with a red ball in the park"),
    ("a plate of food on a table", "a white plate topped with food on a wooden table", "a plate of food on a table"),
    ("a cat", "a black cat sits on a chair near the window", "the cat looks out of the window"),
    ("a man in a suit and a tie and a hat and a suit", "a man in a suit and tie", "a man wearing a suit"),
    ("a red double decker bus driving down the street", "a red bus drives down a city street",
     "a double decker bus is driving down the street", "a red double decker bus driving down the street"),
    ("sheep", "a flock of sheep grazing on a hill"),
    ("a table with a vase of flowers on it", "flowers in a vase on top of a table"),
]  # fmt: skip
# pycocoevalcap 1.2 on ROWS.
STORED_BLEU = (0.67416289, 0.57355754, 0.50276128, 0.4532466)
STORED_ROUGE = (0.75, 0.64098074, 1.0, 0.29756098, 0.70930233, 1.0, 0.19488818, 0.33333333)
STORED_CIDER = (1.56121266, 3.26221318, 6.0999161, 0.62361879, 1.33117244, 5.67268574, 0.62498769, 2.38852432)


def split(captions):
    """``(captions, references)`` as words."""
    rows = [[text.split() for text in row] for row in captions]
    return [row[0] for row in rows], [row[1:] for row in rows]


def made_up(images, seed):
    """Random captions, which share n-grams with their references, one of them empty."""
    generator = random.Random(seed)
    words = "a man woman dog on the beach with red ball rides wave board blue of and two".split()
    rows = []
    for _ in range(images):
        references = [" ".join(generator.choices(words, k=generator.randint(1, 12))) for _ in range(4)]
        references = references[: generator.randint(1, 4)]
        start = generator.choice(references).split()[: generator.randint(1, 9)]
        rows.append((" ".join([*start, generator.choice(words)]), *references))
    return [*rows, ("", *rows[0][1:])]


def test_by_hand():
    caption, reference = "the cat sat on the mat".split(), "the cat sat on a mat".split()
    precisions = (5 / 6, 3 / 5, 2 / 4, 1 / 3)
    expected = [math.prod(precisions[:n]) ** (1 / n) for n in range(1, 5)]
    assert bleu([caption], [[reference]]) == pytest.approx(expected)
    assert rouge_l(caption, [reference]) == pytest.approx(5 / 6)
    # "a" is in both images' references: weight 0. Unigrams and bigrams share one of two words of equal weight.
    cider = CiderD([["a red dog".split()], ["a blue cat".split()]])
    assert cider.score(0, "a red cat".split()) == pytest.approx(10 * (0.5 + 0.5) / 4)
    assert cider.score(0, "a red dog".split()) == pytest.approx(10 * 3 / 4)  # there are no 4-grams


def test_a_short_caption_pays_for_its_length():
    assert bleu([["the", "cat"]], [["the cat sat".split()]])[0] == pytest.approx(math.exp(1 - 3 / 2))
    cider = CiderD([["a red dog runs".split()], ["blue".split()]])
    same, longer = cider.score(0, "a red dog runs".split()), cider.score(0, "a red dog runs on and on".split())
    assert longer < same * math.exp(-(3**2) / (2 * 6**2)) < same


def test_nothing_in_common_and_nothing_at_all():
    references = [["a red dog".split()], ["a blue cat".split()]]
    for caption in (["green", "house"], []):
        assert rouge_l(caption, references[0]) == 0
        assert CiderD(references).score(0, caption) == 0
        assert bleu([caption, []], references) == (0, 0, 0, 0)


def test_bleu_is_not_smoothed():
    """Three words in a row match, four nowhere."""
    found = bleu(["a red dog sits".split()], [["a red dog runs".split()]])
    assert found[:3] == pytest.approx((3 / 4, (3 / 4 * 2 / 3) ** 0.5, (3 / 4 * 2 / 3 * 1 / 2) ** (1 / 3)))
    assert found[3] == 0


def test_one_image_has_no_weights_and_scores_zero():
    assert CiderD([["a red dog".split()]]).score(0, "a red dog".split()) == 0


def test_images_without_references_are_refused():
    for references in ([], [[["a"]], []]):
        with pytest.raises(ValueError, match="at least one"):
            CiderD(references)


def test_stored_figures_of_pycocoevalcap():
    captions, references = split(ROWS)
    cider = CiderD(references)
    assert bleu(captions, references) == pytest.approx(STORED_BLEU, abs=1e-6)
    assert [rouge_l(*pair) for pair in zip(captions, references)] == pytest.approx(STORED_ROUGE, abs=1e-6)
    scores = [cider.score(image, caption) for image, caption in enumerate(captions)]
    assert scores == pytest.approx(STORED_CIDER, abs=1e-6)


@pytest.mark.parametrize("rows", [ROWS, made_up(150, seed=1)], ids=["written", "made up"])
def test_equal_to_pycocoevalcap(rows):
    if not HAS_COCO:
        pytest.skip("pycocoevalcap is not installed (extra captions); its stored figures are compared above")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    found = {image: [row[0]] for image, row in enumerate(rows)}
    truth = {image: list(row[1:]) for image, row in enumerate(rows)}
    captions, references = split(rows)
    cider = CiderD(references)
    assert bleu(captions, references) == pytest.approx(Bleu(4).compute_score(truth, found, verbose=0)[0], abs=1e-6)
    rouge = Rouge().compute_score(truth, found)[1]
    assert [rouge_l(*pair) for pair in zip(captions, references)] == pytest.approx(rouge.tolist(), abs=1e-6)
    theirs = Cider().compute_score(truth, found)[1]
    ours = [cider.score(image, caption) for image, caption in enumerate(captions)]
    assert ours == pytest.approx(theirs.tolist(), abs=1e-6)


IMAGES = [{"id": 7, "file_name": "7.jpg"}, {"id": 3}]
ANNOTATIONS = [
    {"image_id": 3, "id": 1, "caption": "a cat"},
    {"image_id": 7, "id": 2, "caption": "a dog"},
    {"image_id": 3, "id": 3, "caption": "the cat"},
]


def write_truth(path, images=IMAGES, annotations=ANNOTATIONS, **others):
    path.write_text(json.dumps({"images": images, "annotations": annotations, **others}))
    return path


def test_captions_by_image(tmp_path):
    found = read_ground_truth(write_truth(tmp_path / "gt.json", info={}, licenses=[]))
    assert found == {7: ["a dog"], 3: ["a cat", "the cat"]}
    assert list(found) == [7, 3]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"annotations": [*ANNOTATIONS, {"image_id": 9, "id": 4, "caption": "x"}]}, "annotation 4 is of image 9"),
        ({"annotations": ANNOTATIONS[:1]}, "image 7 has no caption"),
        ({"images": [], "annotations": []}, "no image in it"),
        ({"annotations": [{"image_id": 3, "id": 1, "caption": None}]}, "annotation 1 has no text"),
        ({"images": [{"id": "7"}]}, "not a file of COCO captions"),
        ({"images": [{}]}, "not a file of COCO captions: KeyError"),
        ({"images": 5}, "not a file of COCO captions"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_ground_truth(write_truth(tmp_path / "gt.json", **changes))


def test_a_missing_file_and_one_that_is_no_json(tmp_path):
    with pytest.raises(FileNotFoundError, match="gt.json is missing"):
        read_ground_truth(tmp_path / "gt.json")
    (tmp_path / "gt.json").write_text('{"images": [')
    with pytest.raises(ValueError, match="gt.json:1: not valid JSON"):
        read_ground_truth(tmp_path / "gt.json")
    (tmp_path / "gt.json").write_text("[]")
    with pytest.raises(ValueError, match="not a file of COCO captions"):
        read_ground_truth(tmp_path / "gt.json")


# What pycocoevalcap 1.2 made of these lines.
STORED = {
    "A man's riding a wave on top of a surfboard.": "a man 's riding a wave on top of a surfboard",
    "Two dogs (one black, one white) play with a ball!": "two dogs -lrb- one black one white -rrb- play with a ball",
    '"Look out!" says the sign; it\'s 10:30 a.m. today.': "look out says the sign it 's 10:30 a.m. today",
    "A T-shirt hanging on the clothes-line -- it's wet...": "a t-shirt hanging on the clothes-line it 's wet",
    "Mr. Smith doesn't like the U.S. flag, he can't and won't see it.":
        "mr. smith does n't like the u.s. flag he ca n't and wo n't see it",
    "The grey car is red/blue & green.": "the grey car is red/blue & green",
    "He is gonna cannot gimme $5.99 or 1,000 euros 50% off #1 @home":
        "he is gon na can not gim me $ 5.99 or 1,000 euros 50 % off # 1 @home",
    "man’s shoe – “here” button": "man 's shoe here button",
    "woman: medium-dark skin tone, red hair": "woman medium-dark skin tone red hair",
    "flag: St. Barthélemy": "flag st. barthélemy",
    "a stop sign. a red one. at no. 5": "a stop sign a red one at no. 5",
    "A cat? A cat?! Yes!!": "a cat a cat ?! yes !!",
    "a man named J. Smith.": "a man named j. smith",
    "jack-o-lantern mother-in-law's o'clock": "jack-o-lantern mother-in-law 's o'clock",
    "1/2 of an apple, 3-4 people, 2nd place, the '90s": "1/2 of an apple 3-4 people 2nd place the '90s",
    "AT&T sign at 3:45pm, 50cm wide": "at&t sign at 3:45 pm 50cm wide",
    "[square] {curly}": "-lsb- square -rsb- -lcb- curly -rcb-",
    "a cat 's bed, they 're here, it is n't": "a cat 's bed they 're here it is n't",
    "красное яблоко «налево»": "красное яблоко налево",
    "क्रिस्टल बॉल, भविष्य देखना": "क्रिस्टल बॉल भविष्य देखना",
    "หมวกแก๊ป": "หมวกแก๊ป",
    "红苹果": "红苹果",
    "": "",
}  # fmt: skip


@pytest.mark.parametrize("caption", STORED)
def test_stored_outputs_of_the_ptb_tokenizer(caption: str) -> None:
    assert tokenize(caption) == STORED[caption].split()


def test_the_real_ptb_tokenizer_gives_the_same() -> None:
    if importlib.util.find_spec("pycocoevalcap") is None:
        pytest.skip("pycocoevalcap is not installed (extra captions); the stored outputs are compared above")
    if shutil.which("java") is None:
        pytest.skip("there is no java; the stored outputs are compared above")
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    captions = [caption for caption in STORED if caption]
    found = PTBTokenizer().tokenize({0: [{"caption": caption} for caption in captions]})[0]
    assert found == [" ".join(tokenize(caption)) for caption in captions]
