"""BLEU, ROUGE-L and CIDEr-D: by hand, against stored figures of pycocoevalcap, and against itself where installed."""

import importlib.util
import math
import random

import pytest

from mhmoe_fairseq.metrics.captions import CiderD, bleu, rouge_l

# An image each: the model's caption, then the references.
CAPTIONS = [
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
# pycocoevalcap 1.2 on CAPTIONS.
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
    captions, references = split(CAPTIONS)
    cider = CiderD(references)
    assert bleu(captions, references) == pytest.approx(STORED_BLEU, abs=1e-6)
    assert [rouge_l(*pair) for pair in zip(captions, references)] == pytest.approx(STORED_ROUGE, abs=1e-6)
    scores = [cider.score(image, caption) for image, caption in enumerate(captions)]
    assert scores == pytest.approx(STORED_CIDER, abs=1e-6)


@pytest.mark.parametrize("rows", [CAPTIONS, made_up(150, seed=1)], ids=["written", "made up"])
def test_equal_to_pycocoevalcap(rows):
    if importlib.util.find_spec("pycocoevalcap") is None:
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
