"""The SentencePiece vocabulary: fairseq's indices, lossless, deterministic, clear about an impossible size."""

import pytest

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.data import sentencepiece_vocabulary
from mhmoe_fairseq.data.sentencepiece_vocabulary import SentencePieceVocabulary, check_vocab_size, train_sentencepiece


def train(path, lines, vocab_size=330, model="unigram", max_lines=10**6, seed=1):
    train_sentencepiece(
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
    monkeypatch.setattr(sentencepiece_vocabulary, "_MAX_LINE_BYTES", 200)
    short = sentences(300)
    lines = [" ".join(short[start : start + 20]) for start in range(0, 300, 20)]
    assert min(map(len, lines)) > 200
    pieces = [piece for line in lines for piece in sentencepiece_vocabulary._cut(line)]
    assert [word for piece in pieces for word in piece.split()] == " ".join(short).split()
    assert max(len(piece.encode()) for piece in pieces) <= 200
    assert "".join(sentencepiece_vocabulary._cut("\u20ac" * 333)) == "\u20ac" * 333  # where there is no space
    assert len(train(tmp_path / "m.model", lines).symbols) + 4 == 330


def test_a_size_below_the_characters_is_refused(tmp_path, sentences):
    with pytest.raises(UserError, match="--vocab-size 265: too small, .* need at least \\d+"):
        train(tmp_path / "m.model", sentences(50), vocab_size=265)
    with pytest.raises(UserError, match="--vocab-size 260: must be at least 261"):
        check_vocab_size(260)


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
