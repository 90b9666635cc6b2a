"""``--bpe mhmoe_sentencepiece``, without loss, and ``--bpe mhmoe_tiktoken``, GPT-4's byte pairs from a local file."""

from dataclasses import dataclass, field  # fairseq reads the field types: no postponed annotations here
from typing import Any, Optional

from fairseq.data.encoders import register_bpe
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE, SentencepieceConfig
from fairseq.dataclass import FairseqDataclass

from ..common.errors import UserError
from ..data.vocabularies import TiktokenVocabulary

_FLAG = "--mhmoe-tiktoken-ranks"


@register_bpe("mhmoe_sentencepiece", dataclass=SentencepieceConfig)
class WholeSentencepieceBPE(SentencepieceBPE):
    """Text <-> pieces, without loss, with fairseq's own options.

    fairseq's ``sentencepiece`` encodes alike but joins pieces as strings, so that the byte pieces of a character
    outside the vocabulary stay visible: "caf<0xC3><0xA9>".
    """

    def decode(self, pieces: str) -> str:
        """Space-separated pieces to text; byte pieces become characters again."""
        return self.sp.decode_pieces(pieces.split())


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
        UserError: without a rank file, with a malformed one, or without the ``tiktoken`` package.
    """

    def __init__(self, cfg: Any) -> None:
        if not cfg.mhmoe_tiktoken_ranks:
            raise UserError(f"{_FLAG} is needed: a local rank file, such as cl100k_base.tiktoken")
        self.vocabulary = TiktokenVocabulary(cfg.mhmoe_tiktoken_ranks, flag=_FLAG)

    def encode(self, text: str) -> str:
        """Text to ranks."""
        return " ".join(map(str, self.vocabulary.encode(text)))

    def decode(self, ranks: str) -> str:
        """Ranks to text; fairseq's own symbols such as ``<unk>`` are left out."""
        return self.vocabulary.decode(int(rank) for rank in ranks.split() if rank.isdigit())
