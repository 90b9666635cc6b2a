"""Vocabularies: SentencePiece, trained here, and tiktoken from a local rank file; and fairseq's dictionary made of one.

SentencePiece's four special pieces take fairseq's own indices (``<s>`` 0, ``<pad>`` 1, ``</s>`` 2, ``<unk>`` 3), so a
piece's SentencePiece id is its dictionary index, and a dictionary of ``--vocab-size`` entries is exactly the model. It
is trained on the training part only, with byte fallback, so that nothing is ever ``<unk>``.

A tiktoken rank file (such as GPT-4's ``cl100k_base``) has one token a line: its bytes in base64, a space, its rank. In
fairseq's dictionary a token is spelled by its rank in decimal digits, as in fairseq's own GPT-2 encoder, so that
``dictionary index = rank + 4``. Nothing is ever downloaded.

The vocabulary's file lies beside ``dict.txt`` in prepared data, so that whatever opens these knows how text is encoded.
"""

import base64
import binascii
import importlib.util
import io
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import UserError
from ..common.files import atomic_open, atomic_path, require_files, sha256_of
from .documents import SPACE_PIECE

MODEL_FILE, RANKS_FILE = "sentencepiece.model", "ranks.tiktoken"
TOKENIZERS = ("sentencepiece", "tiktoken")
MODELS = ("unigram", "bpe")
NUM_SPECIALS = 4  # fairseq's <s>, <pad>, </s>, <unk>: indices 0..3
_NUM_BYTES = 256
_TRAINING_THREADS = 2  # part of the result: the order of float sums depends on it, the machine's cores must not
_MAX_LINE_BYTES = 1 << 20
_MAX_CHARACTER_BYTES = 4  # in UTF-8
# How cl100k_base cuts text before merging bytes: contractions, words, up to three digits, punctuation, white space.
CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def check_tokenizer(tokenizer: str, vocab_size: int, ranks: Path | None) -> None:
    """Check that the flags ``--tokenizer``, ``--vocab-size`` and ``--tiktoken-ranks`` fit each other.

    Raises:
        UserError: naming the flag and the rule.
    """
    if tokenizer != "tiktoken":
        check_vocab_size(vocab_size)
        if ranks is not None:
            raise UserError("--tiktoken-ranks: has no meaning without --tokenizer tiktoken")
        return
    if ranks is None:
        raise UserError("--tokenizer tiktoken: needs --tiktoken-ranks FILE (a local rank file; nothing is downloaded)")
    load_ranks(ranks, "--tiktoken-ranks")
    _require_tiktoken()


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
    """Train a model on ``lines`` and write it atomically to ``path``.

    SentencePiece passes over lines above a limit without a word, so longer ones are cut at spaces.

    Args:
        num_lines: how many ``lines`` yields.
        max_lines: above this, a share of the lines drawn from ``seed`` is used.

    Raises:
        UserError: ``vocab_size`` is too large or too small for the text.
    """
    import sentencepiece

    buffer, generator = io.BytesIO(), random.Random(seed)
    if num_lines > max_lines:
        lines = (line for line in lines if generator.random() < max_lines / num_lines)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(piece for line in lines for piece in _cut(line)),
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
        raise UserError(f"--vocab-size {vocab_size}: {_explain(' '.join(str(error).split()))}") from error
    with atomic_open(path) as stream:
        stream.write(buffer.getvalue())


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


def _explain(message: str) -> str:
    """SentencePiece's complaint about the size as what is wrong with ``--vocab-size``."""
    if most := re.search(r"value <= (\d+)", message):
        return f"too large for this corpus, whose training part supports at most {most[1]}"
    if least := re.search(r"smaller than required_chars\. (\d+) vs (\d+)", message):
        return f"too small, the training part's characters and bytes need at least {least[2]}"
    return f"SentencePiece cannot train on this corpus ({message})"


def open_model(path: Path) -> Any:
    """Return a ``SentencePieceProcessor``; ``UserError`` when the file is not a model."""
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path}: not a SentencePiece model ({' '.join(str(error).split())})") from error


class SentencePieceVocabulary:
    """A trained SentencePiece model; its ``symbols`` fill fairseq's dictionary from index 4 on.

    Raises:
        UserError: the file is not a SentencePiece model, or its special pieces have other ids than fairseq's.
    """

    def __init__(self, path: Path):
        self._model = open_model(path)
        specials = (self._model.bos_id(), self._model.pad_id(), self._model.eos_id(), self._model.unk_id())
        if specials != tuple(range(NUM_SPECIALS)):
            raise UserError(f"{path}: its <s>, <pad>, </s>, <unk> have ids {specials}, not fairseq's 0, 1, 2, 3")
        self.symbols = [self._model.id_to_piece(index) for index in range(NUM_SPECIALS, self._model.vocab_size())]

    @property
    def texts(self) -> list[bytes]:
        """What each of ``symbols`` stands for in a text, in UTF-8."""
        ids = enumerate(self.symbols, start=NUM_SPECIALS)
        return [
            bytes([int(symbol[3:5], 16)]) if self._model.is_byte(index) else symbol.replace(SPACE_PIECE, " ").encode()
            for index, symbol in ids
        ]

    def encode_lines(self, lines: list[str]) -> list[list[int]]:
        """Return the dictionary indices of each line, without an end mark."""
        return self._model.encode(lines, num_threads=1)

    def describe(self) -> dict[str, object]:
        """Return what the manifest records."""
        return {"kind": "sentencepiece", "pieces": self._model.vocab_size(), "byte_pieces": _NUM_BYTES}


class TiktokenVocabulary:
    """A rank file, read by the ``tiktoken`` package; its ``symbols`` fill fairseq's dictionary from index 4 on.

    Args:
        flag: the flag that gave ``path``, for error messages; empty for a file beside a dictionary.

    Raises:
        UserError: ``tiktoken`` is not installed, or the rank file is missing or malformed.
    """

    def __init__(self, path: str | Path, flag: str = ""):
        self._path = Path(path)
        ranks = load_ranks(self._path, flag)
        _require_tiktoken()
        import tiktoken

        self.symbols = [str(rank) for rank in range(len(ranks))]
        self._encoding: Any = tiktoken.Encoding(
            name=self._path.stem, pat_str=CL100K_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )

    @property
    def texts(self) -> list[bytes]:
        """What each of ``symbols`` stands for in a text, in UTF-8."""
        return [self._encoding.decode_single_token_bytes(rank) for rank in range(len(self.symbols))]

    def encode(self, text: str) -> list[int]:
        """Return the ranks of a text; nothing in it is ever read as a special token."""
        return self._encoding.encode(text, disallowed_special=())

    def decode(self, ranks: Iterable[int]) -> str:
        """Return the text of ranks; bytes that are not UTF-8 (a cut character) become U+FFFD."""
        return self._encoding.decode(list(ranks), errors="replace")

    def encode_lines(self, lines: list[str]) -> list[list[int]]:
        """Return the dictionary indices of each line (rank + 4), without an end mark."""
        return [[rank + NUM_SPECIALS for rank in self.encode(line)] for line in lines]

    def describe(self) -> dict[str, object]:
        """Return what the manifest records."""
        return {"kind": "tiktoken", "ranks": len(self.symbols), "rank_file_sha256": sha256_of(self._path)}


Vocabulary = SentencePieceVocabulary | TiktokenVocabulary


def find_vocabulary(folder: Path, symbols: Sequence[str] = ()) -> Path | None:
    """Return the file of a folder's vocabulary; None where its dictionary has whole words.

    Args:
        symbols: the dictionary's, from index 4 on: pieces or ranks are no words.

    Raises:
        UserError: there are two such files, or none although the symbols are pieces or ranks.
    """
    found = [folder / name for name in (MODEL_FILE, RANKS_FILE) if (folder / name).is_file()]
    if len(found) > 1:
        raise UserError(f"{folder}: has {MODEL_FILE} and {RANKS_FILE}: remove the one of which its dict.txt is not")
    are_ranks = [*symbols[:_NUM_BYTES]] == [str(rank) for rank in range(_NUM_BYTES)]
    if not found and (are_ranks or any(symbol.startswith(SPACE_PIECE) for symbol in symbols)):
        missing, parts = (RANKS_FILE, "tokens") if are_ranks else (MODEL_FILE, "pieces")
        raise UserError(
            f"{folder}: no {missing} in it, of whose {parts} its dict.txt is: copy it there from where that dictionary "
            "comes from"
        )
    return found[0] if found else None


def dictionary_files(folder: Path) -> list[Path]:
    """Return ``dict.txt`` and, unless words are the vocabulary, the file beside it."""
    return [folder / "dict.txt", *filter(None, [find_vocabulary(folder)])]


def read_vocabulary(path: Path) -> Vocabulary:
    """Return the vocabulary of a file that is named as in prepared data."""
    return TiktokenVocabulary(path) if path.name == RANKS_FILE else SentencePieceVocabulary(path)


def open_vocabulary(folder: Path, symbols: Sequence[str]) -> Vocabulary | None:
    """Return what encodes text for a folder's dictionary; None where that has whole words.

    Args:
        symbols: the dictionary's, from index 4 on; others, as of languages, may follow the vocabulary's.

    Raises:
        UserError: as by :func:`find_vocabulary`, or the dictionary is not of the vocabulary: the line where it differs.
    """
    path = find_vocabulary(folder, symbols)
    if path is None:
        return None
    vocabulary = read_vocabulary(path)
    expected = vocabulary.symbols
    for number, (symbol, other) in enumerate(zip_longest(expected, symbols[: len(expected)]), start=1):
        if symbol != other:
            shown = repr(other) if other else "its end"
            rule = f"{shown} where {path} has {symbol!r}: the dictionary is another model's"
            raise UserError(f"{folder / 'dict.txt'}:{number}: {rule}")
    return vocabulary


def load_ranks(path: Path, flag: str = "") -> dict[bytes, int]:
    """Read a rank file.

    Raises:
        UserError: the file is missing, a line is not ``BASE64 RANK`` (names file:line), or the ranks are not
            0..N-1 with all 256 single bytes among the tokens.
    """
    require_files([path], flag)
    name, ranks = f"{flag} {path}".lstrip(), dict[bytes, int]()
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error) as error:
                raise UserError(f"{path}:{number}: a rank file has 'BASE64 RANK' on each line") from error
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"{name}: the ranks of its {len(ranks)} tokens must be 0, 1, 2, ... without a gap")
    missing = [value for value in range(_NUM_BYTES) if bytes([value]) not in ranks]
    if missing:
        raise UserError(f"{name}: byte 0x{missing[0]:02x} has no token; every single byte needs one")
    return ranks


def _require_tiktoken() -> None:
    if importlib.util.find_spec("tiktoken") is None:
        raise UserError("tiktoken: the package is not installed; pip install 'mhmoe_fairseq[tiktoken]'")


def write_dictionary(
    path: Path, symbols: Sequence[str], counts: np.ndarray, extra_symbols: Sequence[str] = (), multiple: int = 8
) -> None:
    """Write ``dict.txt`` atomically: the four specials, ``symbols`` with counts, ``extra_symbols``, and padding.

    Args:
        counts: (len(symbols) + 4,) occurrences by dictionary index.
        extra_symbols: symbols that no text has (count 0), such as those of languages.
        multiple: made-up symbols are added until the size is a multiple of this; 1 for none.
    """
    from fairseq.data import Dictionary

    dictionary = Dictionary()
    occurrences = [*map(int, counts[NUM_SPECIALS:]), *(0 for _ in extra_symbols)]
    for index, symbol in enumerate([*symbols, *extra_symbols], start=NUM_SPECIALS):
        if dictionary.add_symbol(symbol, n=occurrences[index - NUM_SPECIALS]) != index:
            raise RuntimeError(f"symbol {symbol!r} occurs twice in the vocabulary")
    dictionary.pad_to_multiple_(multiple)
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        dictionary.save(stream)
