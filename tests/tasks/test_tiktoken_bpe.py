"""The tiktoken tokenizer reads a local rank file or says what is missing."""

import base64
import sys
from argparse import Namespace

import pytest
from fairseq.data.encoders import build_bpe

from mhmoe_fairseq.tasks.tiktoken_bpe import TiktokenBPE, read_ranks


@pytest.fixture
def rank_file(tmp_path):
    """All bytes, and two merges."""
    tokens = [bytes([number]) for number in range(256)] + [b"he", b" w"]
    path = tmp_path / "small.tiktoken"
    path.write_bytes(b"\n".join(base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)))
    return path


def config(path):
    return Namespace(bpe="mhmoe_tiktoken", mhmoe_tiktoken_ranks=path and str(path))


def test_ranks_are_read(rank_file):
    ranks = read_ranks(rank_file)
    assert len(ranks) == 258 and ranks[b"he"] == 256 and ranks[b"A"] == 65


def test_there_and_back(rank_file):
    pytest.importorskip("tiktoken", reason="an optional extra: pip install tiktoken")
    bpe = TiktokenBPE(config(rank_file))
    assert bpe.encode("he w") == "256 257"
    text = "hello wörld,\n 12345 – and more"
    assert bpe.decode(bpe.encode(text)) == text
    assert bpe.decode("256 <unk> 65") == "heA"


def test_fairseq_finds_it_by_name(rank_file):
    pytest.importorskip("tiktoken", reason="an optional extra: pip install tiktoken")
    args = Namespace(bpe="mhmoe_tiktoken", mhmoe_tiktoken_ranks=str(rank_file))
    assert isinstance(build_bpe(args), TiktokenBPE)


@pytest.mark.parametrize("path", [None, "nowhere.tiktoken"])
def test_a_rank_file_is_needed(path):
    with pytest.raises(ValueError, match=rf"--mhmoe-tiktoken-ranks \({path}\) must be a local rank file"):
        TiktokenBPE(config(path))


def test_the_package_is_needed(rank_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ValueError, match="needs the tiktoken package: pip install tiktoken"):
        TiktokenBPE(config(rank_file))


@pytest.mark.parametrize(
    "text, message", [("YQ== 0\nnonsense", "line 2 is no base64"), ("YQ== x", "line 1"), ("", "empty")]
)
def test_malformed_rank_files(tmp_path, text, message):
    path = tmp_path / "broken.tiktoken"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_ranks(path)
