"""The exported tokenizer gives the ids that this package scores."""

import base64
import random
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fairseq.data import Dictionary
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceConfig

from mhmoe_fairseq.checkpoints.huggingface.tokenizer import build_tokenizer
from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.data.documents import clean_line
from mhmoe_fairseq.data.vocabularies import MODEL_FILE, SentencePieceVocabulary, open_vocabulary, train_sentencepiece
from mhmoe_fairseq.evaluation.scoring import TextScorer
from mhmoe_fairseq.tasks.tokenizers import TiktokenBPE, WholeSentencepieceBPE

pytest.importorskip("tokenizers", reason="needs pip install tokenizers")
SENTENCES = (
    "The quick brown fox jumps over the lazy dog, doesn't it? 3.14159 and 1,000,000.",
    "Fährt Straße über Größe und Füße; señor, garçon, naïve, Ελληνικά και ελληνικά.",
    "Быстрая лиса перепрыгивает через ленивую собаку. Бърза кафява лисица.",
    "السلام عليكم ورحمة الله وبركاته، שלום עולם، یہ ایک جملہ ہے۔",
    "यह एक वाक्य है। ประโยคภาษาไทยไม่มีช่องว่าง 你好，世界。这是一个句子。Đây là một câu tiếng Việt.",
)
ODD = (
    "", " ", "\n", "\n\n", " \n a", "a\n", "a\n\nb", "\ta\t\tb ",
    "a\r\nb\rc\x0bd\x0ce\x1cf\x1eg\x85h\u2028i\u2029j",
    "a\x00b\x07c\x1f\x7fd",
    "\ufeffBOM", "e\u0301 n\u0303 a\u0308\u0323 \u1e9b\u0323", "\u202bאבג\u202c abc \u200fשלום", "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪",
    "a\u00a0b\u2003c\u3000d\u200be", "\u2581 a\u2581b", "ﬁ Ａ ① ½ K", "<mask> &lt; </S>",
    "don't I'LL we'Ve 12345678",
    "x" * 37 + "yz" * 20, "Ωmega" * 2000, "$\\frac{1}{2}$ `code`  -- --- ...",
)  # fmt: skip


def texts(count: int) -> list[str]:
    """Lines of several scripts, cut and put together at random."""
    generator, alphabet = random.Random(0), "".join(SENTENCES) + "  \n\n\t\u0301\U0001f600"
    found = [*SENTENCES, *ODD, "\n".join(SENTENCES)]
    while len(found) < count:
        words = " ".join(SENTENCES).split()
        if len(found) % 2:
            found.append("".join(generator.choices(alphabet, k=generator.randrange(1, 40))))
        else:
            found.append(generator.choice(" \n").join(generator.choices(words, k=generator.randrange(1, 12))))
    return found


def write_ranks(path: Path) -> Path:
    """A rank file with merges of merges, learnt by no one: pairs that are frequent in the sentences."""
    ranks = [bytes([value]) for value in range(256)]
    for word in sorted({word for line in SENTENCES for word in line.split()}):
        token = f" {word}".encode()
        if token not in ranks:
            ranks += [token[:end] for end in range(2, len(token) + 1) if token[:end] not in ranks]
    lines = (base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(ranks))
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.fixture(scope="module", params=["unigram", "bpe", "tiktoken"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, TextScorer]:
    """The exported tokenizer, and this package's scorer of the same vocabulary without a model."""
    folder, ranks = tmp_path_factory.mktemp(request.param), None
    if request.param == "tiktoken":
        pytest.importorskip("tiktoken", reason="needs pip install tiktoken")
        ranks = write_ranks(folder / "small.tiktoken")
        bpe: Any = TiktokenBPE(SimpleNamespace(mhmoe_tiktoken_ranks=str(ranks)))
    else:
        lines = [
            clean_line(" ".join(random.Random(seed).sample(" ".join(SENTENCES).split(), 12))) for seed in range(300)
        ]
        settings = {"vocab_size": 450, "model": request.param, "max_lines": 1000, "seed": 0}
        train_sentencepiece(lines, len(lines), folder / MODEL_FILE, **settings)
        bpe = WholeSentencepieceBPE(SentencepieceConfig(sentencepiece_model=str(folder / MODEL_FILE)))
    dictionary = Dictionary()
    for symbol in (*open_vocabulary(folder, ranks).symbols, "__de__"):
        dictionary.add_symbol(symbol)
    dictionary.pad_to_multiple_(8)
    scorer = object.__new__(TextScorer)
    scorer.clean, scorer.dictionary, scorer._told_of_unknown_words = True, dictionary, True
    scorer.model = SimpleNamespace(encode=lambda line: dictionary.encode_line(bpe.encode(line)).long())
    return build_tokenizer(dictionary, folder, ranks, "</s>"), scorer


def test_ids_are_those_that_are_scored(both: tuple[Any, TextScorer]) -> None:
    tokenizer, scorer = both
    wrong = [text for text in texts(800) if tokenizer.encode(text).ids != [2, *scorer.encode(text)]]
    assert not wrong, (len(wrong), [(text[:60], tokenizer.encode(text).tokens[:30]) for text in wrong[:4]])


def test_tokens_become_the_text_again(both: tuple[Any, TextScorer]) -> None:
    tokenizer, _ = both
    for text in map(clean_line, (*SENTENCES, *filter(str.strip, ODD))):
        assert tokenizer.decode(tokenizer.encode(text).ids) == unicodedata.normalize("NFC", text)


def test_symbols_that_a_text_spells_are_read_as_such(both: tuple[Any, TextScorer]) -> None:
    """What docs/export.md says of known differences."""
    tokenizer, scorer = both
    for symbol in ("</s>", "<s>", "<pad>", "<unk>", "__de__"):
        index = scorer.dictionary.index(symbol)
        assert index in tokenizer.encode(f"a {symbol} b").ids[1:] and index not in scorer.encode(f"a {symbol} b")


def test_lone_surrogates_are_refused(both: tuple[Any, TextScorer]) -> None:
    """SentencePiece refuses them, too; tiktoken reads U+FFFD."""
    with pytest.raises((UnicodeEncodeError, TypeError)):
        both[0].encode("a\ud800b")


def test_words_of_a_dictionary_without_a_vocabulary(tmp_path: Path) -> None:
    dictionary = Dictionary()
    for word in ("the", "river"):
        dictionary.add_symbol(word)
    tokenizer = build_tokenizer(dictionary, tmp_path, None, "<s>")
    assert tokenizer.encode(" the  river\nthe sea").ids == [0, 4, 5, 2, 4, 3]


def test_a_vocabulary_of_other_pieces_is_refused(tmp_path: Path) -> None:
    train_sentencepiece(SENTENCES, 5, tmp_path / MODEL_FILE, vocab_size=450, model="bpe", max_lines=9, seed=0)
    assert SentencePieceVocabulary(tmp_path / MODEL_FILE).symbols
    with pytest.raises(UserError, match="none of its pieces"):
        build_tokenizer(Dictionary(), tmp_path, None, "</s>")
