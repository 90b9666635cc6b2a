"""``--bpe mhmoe_sentencepiece``: fairseq's SentencePiece tokenizer, with the model's own decoding."""

from dataclasses import dataclass  # fairseq reads the field types: no postponed annotations here

from fairseq.data.encoders import register_bpe
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE, SentencepieceConfig


@dataclass
class WholeSentencepieceConfig(SentencepieceConfig):
    """fairseq's own options, ``--sentencepiece-model`` first of all."""


@register_bpe("mhmoe_sentencepiece", dataclass=WholeSentencepieceConfig)
class WholeSentencepieceBPE(SentencepieceBPE):
    """Text <-> pieces, without loss.

    fairseq's ``sentencepiece`` encodes alike but joins pieces as strings, so that the byte pieces of a character
    outside the vocabulary stay visible: "caf<0xC3><0xA9>".
    """

    def decode(self, pieces: str) -> str:
        """Space-separated pieces to text; byte pieces become characters again."""
        return self.sp.decode_pieces(pieces.split())
