"""Vocabularies: SentencePiece's with fairseq's indices, lossless and deterministic; tiktoken's without a download."""

import base64
import sys

import pytest

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.common.files import sha256_of
from mhmoe_fairseq.data import vocabularies
from mhmoe_fairseq.data.vocabularies import (
    SentencePieceVocabulary,
    TiktokenVocabulary,
    find_vocabulary,
    load_ranks,
    open_vocabulary,
)


def train(path, lines, vocab_size=330, model="unigram", max_lines=10**6, seed=1):
    vocabularies.train_sentencepiece(
        iter(lines), len(lines), path, vocab_size=vocab_size, model=model, max_lines=max_lines, seed=seed
    )
    return SentencePieceVocabulary(path)


@pytest.mark.parametrize("model", ["unigram", "bpe"])
def test_exact_size_lossless_and_never_unknown(tmp_path, sentences, model):
    vocabulary = train(tmp_path / "m.model", sentences(300), model=model)
    assert len(vocabulary.symbols) + 4 == 330
    lines = [*sentences(3, seed=9), "größe 漢字 🙂 <unk> </s> <pad>", "a", "ﬁne x² ｗｉｄｅ"]
    encoded = vocabulary.encode_lines(lines)
    assert all(4 <= index < 330 for ids in encoded for index in ids)  # no special symbol comes from text
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    assert processor.decode(encoded) == lines
    assert vocabulary.symbols[:256] == [f"<0x{value:02X}>" for value in range(256)]


def test_training_is_deterministic_and_thinning_follows_the_seed(tmp_path, sentences):
    lines = sentences(600)
    first, again = tmp_path / "a.model", tmp_path / "b.model"
    train(first, lines)
    train(again, lines)
    assert first.read_bytes() == again.read_bytes()
    thinned = [tmp_path / f"{name}.model" for name in "cde"]
    for path, seed in zip(thinned, (1, 1, 2)):
        train(path, lines, vocab_size=300, max_lines=200, seed=seed)
    assert thinned[0].read_bytes() == thinned[1].read_bytes() != thinned[2].read_bytes()


@pytest.mark.parametrize("model", ["unigram", "bpe"])
def test_a_size_that_the_corpus_cannot_fill_is_refused(tmp_path, sentences, model):
    with pytest.raises(UserError, match="--vocab-size 30000: too large for this corpus"):
        train(tmp_path / "m.model", sentences(20), vocab_size=30000, model=model)
    assert list(tmp_path.iterdir()) == []


def test_lines_above_sentencepieces_limit_are_cut_not_dropped(tmp_path, sentences, monkeypatch):
    monkeypatch.setattr(vocabularies, "_MAX_LINE_BYTES", 200)
    short = sentences(300)
    lines = [" ".join(short[start : start + 20]) for start in range(0, 300, 20)]
    assert min(map(len, lines)) > 200
    pieces = [piece for line in lines for piece in vocabularies._cut(line)]
    assert [word for piece in pieces for word in piece.split()] == " ".join(short).split()
    assert max(len(piece.encode()) for piece in pieces) <= 200
    assert "".join(vocabularies._cut("\u20ac" * 333)) == "\u20ac" * 333  # where there is no space
    assert len(train(tmp_path / "m.model", lines).symbols) + 4 == 330


def test_a_size_below_the_characters_is_refused(tmp_path, sentences):
    with pytest.raises(UserError, match="--vocab-size 265: too small, .* need at least \\d+"):
        train(tmp_path / "m.model", sentences(50), vocab_size=265)
    with pytest.raises(UserError, match="--vocab-size 260: must be at least 261"):
        vocabularies.check_vocab_size(260)


def test_a_file_that_is_no_model_is_named(tmp_path):
    path = tmp_path / "x.model"
    path.write_bytes(b"no model")
    with pytest.raises(UserError, match="x.model: not a SentencePiece model"):
        SentencePieceVocabulary(path)


def test_a_model_with_other_special_ids_is_refused(tmp_path, sentences):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(100)), model_prefix=str(tmp_path / "m"), vocab_size=60, minloglevel=3
    )
    with pytest.raises(UserError, match="m.model: its <s>, <pad>, </s>, <unk> have ids \\(1, -1, 2, 0\\)"):
        SentencePieceVocabulary(tmp_path / "m.model")


TOKENS = [bytes([value]) for value in range(256)] + [b"th", b"the", b" the", b"\xc3\xb6"]


def write_ranks(path, tokens=TOKENS):
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return path


def test_ranks_are_read(tmp_path):
    assert load_ranks(write_ranks(tmp_path / "r.tiktoken")) == {token: rank for rank, token in enumerate(TOKENS)}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"dGhl 0\nbroken\n", "r.tiktoken:2: a rank file has 'BASE64 RANK' on each line"),
        (b"!!!! 0\n", "r.tiktoken:1: "),
        (b"dGhl zero\n", "r.tiktoken:1: "),
        (b"", "^--ranks .*r.tiktoken: the ranks of its 0 tokens must be 0, 1, 2"),
        (b"dGhl 0\ndGhh 2\n", "must be 0, 1, 2, ... without a gap"),
        (b"dGhl 0\n", "byte 0x00 has no token"),
    ],
)
def test_malformed_rank_files_are_named(tmp_path, content, message):
    path = tmp_path / "r.tiktoken"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_ranks(path, "--ranks")


def test_a_missing_rank_file_or_package_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--ranks: no such file: .*none.tiktoken"):
        load_ranks(tmp_path / "none.tiktoken", "--ranks")
    monkeypatch.setitem(sys.modules, "tiktoken", None)  # what Python itself uses for "cannot be imported"
    with pytest.raises(UserError, match="tiktoken: the package is not installed; pip install 'mhmoe_fairseq"):
        TiktokenVocabulary(write_ranks(tmp_path / "r.tiktoken"))


def test_encoding_merges_by_rank_and_round_trips(tmp_path):
    pytest.importorskip("tiktoken", reason="tiktoken is an extra")
    path = write_ranks(tmp_path / "r.tiktoken")
    vocabulary = TiktokenVocabulary(path)
    assert vocabulary.encode("the the") == [257, 258]
    text = "the <|endoftext|> größer 漢字\n\n  x1234"
    assert vocabulary.decode(vocabulary.encode(text)) == text
    assert vocabulary.decode([0xC3]) == "\ufffd"
    assert vocabulary.encode_lines(["the the", ""]) == [[261, 262], []]
    assert vocabulary.symbols == [str(rank) for rank in range(260)]
    assert vocabulary.describe()["rank_file_sha256"] == sha256_of(path)


def test_a_folders_vocabulary_is_that_of_its_dictionary(tmp_path, sentences):
    assert find_vocabulary(tmp_path) is None and open_vocabulary(tmp_path, ["the", "river"]) is None  # words
    symbols = train(tmp_path / "sentencepiece.model", sentences(300)).symbols
    opened = open_vocabulary(tmp_path, [*symbols, "__de__"])
    assert isinstance(opened, SentencePieceVocabulary) and opened.symbols == symbols
    for others, line in (([*symbols[:7], "x", *symbols[8:]], "8: 'x' where "), (symbols[:-1], "326: its end where ")):
        with pytest.raises(UserError, match=f"dict.txt:{line}.*sentencepiece.model has .*another model's"):
            open_vocabulary(tmp_path, others)
    write_ranks(tmp_path / "ranks.tiktoken")
    with pytest.raises(UserError, match="has sentencepiece.model and ranks.tiktoken: remove"):
        find_vocabulary(tmp_path)
    (tmp_path / "sentencepiece.model").unlink()
    pytest.importorskip("tiktoken", reason="tiktoken is an extra")
    opened = open_vocabulary(tmp_path, [str(rank) for rank in range(len(TOKENS))])
    assert isinstance(opened, TiktokenVocabulary) and opened.encode("the") == [257]
    with pytest.raises(UserError, match="dict.txt:1: 'the' where .*ranks.tiktoken has '0'"):
        open_vocabulary(tmp_path, ["the"])
