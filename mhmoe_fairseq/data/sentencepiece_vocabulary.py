"""SentencePiece: trained on the training part only, with byte fallback, so that nothing is ever ``<unk>``.

The four special pieces take fairseq's own indices (``<s>`` 0, ``<pad>`` 1, ``</s>`` 2, ``<unk>`` 3), so a piece's
SentencePiece id is its dictionary index, and a dictionary of ``--vocab-size`` entries is exactly the model.
"""

import io
import random
import re
from pathlib import Path
from typing import Any, Iterable, Iterator

from ..common.errors import UserError
from ..common.files import atomic_open
from .vocabulary import NUM_SPECIALS

MODELS = ("unigram", "bpe")
_NUM_BYTES = 256
_TRAINING_THREADS = 2  # part of the result: the order of float sums depends on it, the machine's cores must not
_MAX_LINE_BYTES = 1 << 20
_MAX_CHARACTER_BYTES = 4  # in UTF-8


def check_vocab_size(vocab_size: int) -> None:
    """``UserError`` when the size cannot hold the specials, the byte pieces and a single letter."""
    least = NUM_SPECIALS + _NUM_BYTES + 1
    if vocab_size < least:
        raise UserError(
            f"--vocab-size {vocab_size}: must be at least {least} ({NUM_SPECIALS} special symbols, {_NUM_BYTES} bytes, "
            "and pieces)"
        )


def train_sentencepiece(
    lines: Iterable[str], num_lines: int, path: Path, *, vocab_size: int, model: str, max_lines: int, seed: int
) -> None:
    """Trains a model on ``lines`` and writes it atomically to ``path``.

    SentencePiece passes over lines above a limit without a word, so longer ones are cut at spaces.

    Args:
        num_lines: how many ``lines`` yields.
        max_lines: above this, a share of the lines drawn from ``seed`` is used.

    Raises:
        UserError: ``vocab_size`` is too large or too small for the text.
    """
    import sentencepiece

    buffer = io.BytesIO()
    chosen = _thin(lines, max_lines / num_lines, seed) if num_lines > max_lines else lines
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(piece for line in chosen for piece in _cut(line)),
            model_writer=buffer,
            vocab_size=vocab_size,
            model_type=model,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",  # the text is already in NFC with single spaces: encoding is lossless
            bos_id=0,
            pad_id=1,
            eos_id=2,
            unk_id=3,
            num_threads=_TRAINING_THREADS,
            max_sentence_length=_MAX_LINE_BYTES,
            minloglevel=3,
        )
    except RuntimeError as error:
        raise _explain(error, vocab_size) from error
    with atomic_open(path) as stream:
        stream.write(buffer.getvalue())


def _thin(lines: Iterable[str], share: float, seed: int) -> Iterator[str]:
    generator = random.Random(seed)
    return (line for line in lines if generator.random() < share)


def _cut(line: str) -> Iterator[str]:
    """The line in pieces within SentencePiece's limit, cut at spaces; where there is none, between characters."""
    most = _MAX_LINE_BYTES // _MAX_CHARACTER_BYTES
    start = 0
    if len(line) > most and len(line.encode()) > _MAX_LINE_BYTES:
        while len(line) - start > most:
            space = line.rfind(" ", start + 1, start + most)
            end = start + most if space < 0 else space
            yield line[start:end]
            start = end if space < 0 else end + 1
    yield line[start:]


def _explain(error: RuntimeError, vocab_size: int) -> Exception:
    """SentencePiece's complaint about the size as a sentence about ``--vocab-size``; anything else unchanged."""
    message = " ".join(str(error).split())
    most = re.search(r"value <= (\d+)", message)
    if most:
        return UserError(
            f"--vocab-size {vocab_size}: too large for this corpus, whose training part supports at most {most[1]}"
        )
    least = re.search(r"smaller than required_chars\. (\d+) vs (\d+)", message)
    if least:
        return UserError(
            f"--vocab-size {vocab_size}: too small, the training part's characters and bytes need at least {least[2]}"
        )
    return UserError(f"--vocab-size {vocab_size}: SentencePiece cannot train on this corpus ({message})")


def open_model(path: Path) -> Any:
    """A ``SentencePieceProcessor``; ``UserError`` when the file is not a model."""
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path}: not a SentencePiece model ({' '.join(str(error).split())})") from error


class SentencePieceVocabulary:
    """A trained model, as a :class:`~mhmoe_fairseq.data.vocabulary.Vocabulary`.

    Raises:
        UserError: the file is not a SentencePiece model, or its special pieces have other ids than fairseq's.
    """

    def __init__(self, path: Path):
        self._model = open_model(path)
        specials = (self._model.bos_id(), self._model.pad_id(), self._model.eos_id(), self._model.unk_id())
        if specials != tuple(range(NUM_SPECIALS)):
            raise UserError(f"{path}: its <s>, <pad>, </s>, <unk> have ids {specials}, not fairseq's 0, 1, 2, 3")
        self.symbols = [self._model.id_to_piece(index) for index in range(NUM_SPECIALS, self._model.vocab_size())]

    def encode_lines(self, lines: list[str]) -> list[list[int]]:
        """Dictionary indices of each line, without an end mark."""
        return self._model.encode(lines, num_threads=1)

    def describe(self) -> dict[str, object]:
        """Size and number of byte pieces."""
        return {"kind": "sentencepiece", "pieces": self._model.vocab_size(), "byte_pieces": _NUM_BYTES}
