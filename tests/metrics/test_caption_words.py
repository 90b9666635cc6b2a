"""The words of captions: stored outputs of Stanford's PTBTokenizer as the COCO evaluation runs it, and the real one."""

import importlib.util
import shutil

import pytest

from mhmoe_fairseq.metrics.caption_words import tokenize

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
