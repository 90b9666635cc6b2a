"""``--bpe mhmoe_tiktoken``: GPT-4's byte pairs from a local rank file; nothing is downloaded."""

import base64
import binascii
from dataclasses import dataclass, field  # fairseq reads the field types: no postponed annotations here
from pathlib import Path
from typing import Any, Optional

from fairseq.data.encoders import register_bpe
from fairseq.dataclass import FairseqDataclass

# How cl100k_base cuts text into pieces before byte pairs are merged.
PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"""
    r"""|\s*[\r\n]|\s+(?!\S)|\s"""
)


@dataclass
class TiktokenBPEConfig(FairseqDataclass):
    """Flags of the tokenizer."""

    mhmoe_tiktoken_ranks: Optional[str] = field(
        default=None,
        metadata={"help": "local rank file (such as cl100k_base.tiktoken): a base64 token and its rank per line"},
    )


@register_bpe("mhmoe_tiktoken", dataclass=TiktokenBPEConfig)
class TiktokenBPE:
    """Text <-> space-separated ranks, the words of the dictionary.

    Raises:
        ValueError: without a rank file, with a malformed one, or without the ``tiktoken`` package.
    """

    def __init__(self, cfg: Any) -> None:
        path = cfg.mhmoe_tiktoken_ranks
        if not path or not Path(path).is_file():
            raise ValueError(f"--mhmoe-tiktoken-ranks ({path}) must be a local rank file, such as cl100k_base.tiktoken")
        try:
            import tiktoken
        except ImportError as error:
            raise ValueError("--bpe mhmoe_tiktoken needs the tiktoken package: pip install tiktoken") from error
        self.encoding = tiktoken.Encoding(
            Path(path).stem, pat_str=PATTERN, mergeable_ranks=read_ranks(Path(path)), special_tokens={}
        )

    def encode(self, text: str) -> str:
        """Text to ranks."""
        return " ".join(map(str, self.encoding.encode_ordinary(text)))

    def decode(self, ranks: str) -> str:
        """Ranks to text; fairseq's own symbols such as ``<unk>`` are left out."""
        return self.encoding.decode([int(rank) for rank in ranks.split() if rank.isdigit()])


def read_ranks(path: Path) -> dict[bytes, int]:
    """The ranks of a file with a base64 token and its rank per line.

    Raises:
        ValueError: naming the first line that is none.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{path} line {number} is no base64 token with its rank") from error
    if not ranks:
        raise ValueError(f"{path} is empty")
    return ranks
