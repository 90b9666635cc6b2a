"""A SentencePiece model of anyone's making, such as BEiT-3's, in fairseq's order of ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...common.errors import UserError
from ...data.vocabulary import NUM_SPECIALS

_UNK = 3


class PieceVocabulary:
    """The model's pieces from dictionary index 4 on, whichever ids its special pieces have.

    For BEiT-3's ``beit3.spm`` (``<unk>`` 0, ``<s>`` 1, ``</s>`` 2) these are the ids of the tokenizer that unilm's
    scripts use; a ``<mask>`` after the last piece makes them whole.

    Raises:
        UserError: the file is not a SentencePiece model.
    """

    def __init__(self, path: Path):
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path}: not a SentencePiece model ({' '.join(str(error).split())})") from error
        size = self._model.vocab_size()
        plain = [index for index in range(size) if not (self._model.is_control(index) or self._model.is_unknown(index))]
        self.symbols = [self._model.id_to_piece(index) for index in plain]
        self._ids = np.full(size, _UNK)
        self._ids[plain] = np.arange(NUM_SPECIALS, NUM_SPECIALS + len(plain))

    def encode_lines(self, lines: list[str]) -> list[list[int]]:
        """Dictionary indices of each line, without an end mark."""
        return [self._ids[ids].tolist() for ids in self._model.encode(lines, num_threads=1)]

    def describe(self) -> dict[str, object]:
        """Its size."""
        return {"kind": "sentencepiece", "pieces": self._model.vocab_size()}
