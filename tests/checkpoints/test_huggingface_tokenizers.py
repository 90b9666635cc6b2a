"""The exported tokenizer gives the ids that this package scores."""

import base64
import random
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fairseq.data import Dictionary
from multilingual_data import SENTENCES as SEVERAL

from mhmoe_fairseq.checkpoints.huggingface.tokenizer import build_tokenizer
from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.data.documents import clean_line
from mhmoe_fairseq.data.languages import PAPER_LANGUAGES
from mhmoe_fairseq.data.vocabularies import MODEL_FILE, RANKS_FILE, SentencePieceVocabulary, train_sentencepiece

pytest.importorskip("tokenizers", reason="needs pip install tokenizers")
sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

import compare_tokenizers  # noqa: E402
from compare_tokenizers import ODD, UNKNOWN, Both, difference, make_texts, open_both  # noqa: E402

# The first article of the Universal Declaration of Human Rights; SEVERAL has the others of the paper's languages.
ARTICLE = {
    "bg": "Всички хора се раждат свободни и равни по достойнство и права.\nТе са надарени с разум и съвест.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos.\nDotados están de razón, ¿no?",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits.\nIls sont doués de raison.",
    "hi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।\nउन्हें बुद्धि प्राप्त है।",
    "ru": "Все люди рождаются свободными и равными в своём достоинстве и правах.\nОни наделены разумом и совестью.",
    "sw": "Watu wote wamezaliwa huru, hadhi na haki zao ni sawa.\nWote wamejaliwa akili na dhamiri.",
    "th": "มนุษย์ทั้งปวงเกิดมามีอิสระและเสมอภาคกันในศักดิ์ศรีและสิทธิ\nต่างมีเหตุผลและมโนธรรม",
    "tr": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar.\nAkıl ve vicdana sahiptirler.",
    "ur": "تمام انسان آزاد اور حقوق و عزت کے اعتبار سے برابر پیدا ہوئے ہیں۔\nانہیں ضمیر اور عقل ودیعت ہوئی ہے۔",
    "vi": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền.\nMọi con người đều có lý trí.",
}
LINES = {code: (SEVERAL | ARTICLE)[code].split("\n") for code in PAPER_LANGUAGES}
ALL_LINES = [line for lines in LINES.values() for line in lines]


def write_ranks(path: Path) -> Path:
    """A rank file with merges of merges, learnt by no one: the beginnings of the sentences' words."""
    ranks = [bytes([value]) for value in range(256)]
    for word in sorted({word for line in ALL_LINES for word in line.split()}):
        token = f" {word}".encode()
        if token not in ranks:
            ranks += [token[:end] for end in range(2, len(token) + 1) if token[:end] not in ranks]
    lines = (base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(ranks))
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


@pytest.fixture(scope="module", params=["unigram", "bpe", "tiktoken"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    """The exported tokenizer of a small vocabulary, and this package's scorer of it."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "tiktoken":
        pytest.importorskip("tiktoken", reason="needs pip install tiktoken")
        return open_both(write_ranks(folder / RANKS_FILE).parent)
    words = " ".join(ALL_LINES).split()
    lines = [clean_line(" ".join(random.Random(seed).sample(words, 12))) for seed in range(300)]
    settings = {"vocab_size": 700, "model": request.param, "max_lines": 1000, "seed": 0}
    train_sentencepiece(lines, len(lines), folder / MODEL_FILE, **settings)
    return open_both(folder)


@pytest.mark.parametrize("code", PAPER_LANGUAGES)
def test_ids_are_those_that_are_scored(both: Both, code: str) -> None:
    wrong = [text for text in make_texts(LINES[code], 200, code) if difference(both, text) == UNKNOWN]
    assert not wrong, (len(wrong), [(text[:60], *both.ids(text)) for text in wrong[:4]])


def test_tokens_become_the_text_again(both: Both) -> None:
    for text in map(clean_line, (*ALL_LINES, *filter(str.strip, ODD))):
        assert both.tokenizer.decode(both.ids(text)[0]) == unicodedata.normalize("NFC", text)


def test_symbols_that_a_text_spells_and_new_marks_are_read_otherwise(both: Both) -> None:
    for symbol in ("</s>", "<s>", "<pad>", "<unk>", "__de__"):
        index, (exported, ours) = both.scorer.dictionary.index(symbol), both.ids(f"a {symbol} b")
        assert index in exported[1:] and index not in ours[1:]
        assert difference(both, f"a {symbol} b") == "a spelled symbol"
    assert difference(both, "x\u0301\u08d3") == "marks newer than Unicode 9"  # which tokenizers leaves where they are


def test_lone_surrogates_are_refused(both: Both) -> None:
    """SentencePiece refuses them, too; tiktoken reads U+FFFD."""
    with pytest.raises((UnicodeEncodeError, TypeError)):
        both.tokenizer.encode("a\ud800b")


def test_words_of_a_dictionary_without_a_vocabulary(tmp_path: Path) -> None:
    dictionary = Dictionary()
    for word in ("the", "river"):
        dictionary.add_symbol(word)
    tokenizer = build_tokenizer(dictionary, tmp_path, "<s>")
    assert tokenizer.encode(" the  river\nthe sea").ids == [0, 4, 5, 2, 4, 3]


def test_a_vocabulary_of_other_pieces_is_refused(tmp_path: Path) -> None:
    lines = SEVERAL["en"].split("\n")
    train_sentencepiece(lines, 6, tmp_path / MODEL_FILE, vocab_size=450, model="bpe", max_lines=9, seed=0)
    assert SentencePieceVocabulary(tmp_path / MODEL_FILE).symbols
    with pytest.raises(UserError, match="none of its pieces"):
        build_tokenizer(Dictionary(), tmp_path, "</s>")
    (tmp_path / MODEL_FILE).unlink()
    write_ranks(tmp_path / RANKS_FILE)
    with pytest.raises(UserError, match="ranks.tiktoken is not of the dictionary: its .* tokens are not those of"):
        build_tokenizer(Dictionary(), tmp_path, "</s>")


def test_the_script_counts_texts_of_each_language(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends with 1 where a difference is not a known one."""
    for code in ("en", "th"):
        (tmp_path / "text" / code).mkdir(parents=True)
        (tmp_path / "text" / code / "train.txt").write_text("\n".join(LINES[code]), encoding="utf-8")
    train_sentencepiece(ALL_LINES, 99, tmp_path / MODEL_FILE, vocab_size=700, model="bpe", max_lines=99, seed=0)
    assert compare_tokenizers.main([str(tmp_path), "--texts", "60"]) == 0
    rows = [row.split("|") for row in capsys.readouterr().out.splitlines()[2:]]
    assert [(row[1].strip(), row[2].strip(), row[4].strip()) for row in rows] == [("en", "60", "0"), ("th", "60", "0")]
    both = open_both(tmp_path)
    both.tokenizer.normalizer = None
    monkeypatch.setattr(compare_tokenizers, "open_both", lambda *_: both)
    assert compare_tokenizers.main([str(tmp_path), "--texts", "60"]) == 1 and "unknown" in capsys.readouterr().out


def test_segmentations_of_equal_scores_are_told_from_others() -> None:
    """SentencePiece adds scores in float32: words of thousands of characters may be cut otherwise."""
    exported: Any = SimpleNamespace(encode=lambda text: SimpleNamespace(ids=[2, 0, 1]))
    ours: Any = SimpleNamespace(encode=lambda text: [1, 0, 0], dictionary=SimpleNamespace(eos=lambda: 2))
    kinds = [difference(Both(exported, ours, [score, -9.0, 0.0]), "text") for score in (-1e-6, -1e-3)]
    assert kinds == ["equal scores", UNKNOWN] and difference(Both(exported, ours, []), "text") == UNKNOWN
