"""The tiktoken tokenizer reads a local rank file or says what is missing."""

import base64
from argparse import Namespace

import pytest
from fairseq.data.encoders import build_bpe

from mhmoe_fairseq.tasks.tokenizers import TiktokenBPE


@pytest.fixture
def rank_file(tmp_path):
    """All bytes, and two merges."""
    tokens = [bytes([number]) for number in range(256)] + [b"he", b" w"]
    path = tmp_path / "small.tiktoken"
    path.write_bytes(b"\n".join(base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)))
    return path


def config(path):
    return Namespace(bpe="mhmoe_tiktoken", mhmoe_tiktoken_ranks=path and str(path))


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


def test_a_rank_file_is_needed(tmp_path):
    with pytest.raises(ValueError, match="--mhmoe-tiktoken-ranks is needed: a local rank file"):
        TiktokenBPE(config(None))
    with pytest.raises((ValueError, OSError), match="--mhmoe-tiktoken-ranks.*nowhere.tiktoken"):
        TiktokenBPE(config(tmp_path / "nowhere.tiktoken"))


def test_a_malformed_rank_file_is_named(tmp_path):
    path = tmp_path / "broken.tiktoken"
    path.write_text("YQ== 0\nnonsense")
    with pytest.raises(ValueError, match="broken.tiktoken:2: a rank file has"):
        TiktokenBPE(config(path))
