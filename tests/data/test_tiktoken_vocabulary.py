"""tiktoken rank files: read with care, encoded without a download."""

import base64
import sys

import pytest

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.data.tiktoken_vocabulary import TiktokenDictionaryVocabulary, TiktokenVocabulary, load_ranks

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
        (b"", "--tiktoken-ranks .*r.tiktoken: the ranks of its 0 tokens must be 0, 1, 2"),
        (b"dGhl 0\ndGhh 2\n", "must be 0, 1, 2, ... without a gap"),
        (b"dGhl 0\n", "byte 0x00 has no token"),
    ],
)
def test_malformed_rank_files_are_named(tmp_path, content, message):
    path = tmp_path / "r.tiktoken"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_ranks(path)


def test_a_missing_rank_file_or_package_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--tiktoken-ranks: no such file: .*none.tiktoken"):
        load_ranks(tmp_path / "none.tiktoken")
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
    dictionary = TiktokenDictionaryVocabulary(path)
    assert dictionary.encode_lines(["the the", ""]) == [[261, 262], []]
    assert dictionary.symbols == [str(rank) for rank in range(260)]
    assert dictionary.describe()["rank_file"] == "r.tiktoken"
