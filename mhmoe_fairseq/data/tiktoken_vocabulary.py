"""tiktoken vocabularies (such as GPT-4's ``cl100k_base``) from a local rank file; nothing is ever downloaded.

A rank file has one token a line: its bytes in base64, a space, its rank. In fairseq's dictionary a token is spelled by
its rank in decimal digits, as in fairseq's own GPT-2 encoder, so that ``dictionary index = rank + 4``.
"""

import base64
import binascii
import importlib.util
from pathlib import Path
from typing import Any, Iterable, Optional

from ..common.errors import UserError
from ..common.files import require_files, sha256_of
from .sentencepiece_vocabulary import check_vocab_size
from .vocabulary import NUM_SPECIALS

TOKENIZERS = ("sentencepiece", "tiktoken")

# How cl100k_base cuts text before merging bytes: contractions, words, up to three digits, punctuation, white space.
CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_ranks(path: Path, flag: str = "--tiktoken-ranks") -> dict[bytes, int]:
    """Reads a rank file.

    Raises:
        UserError: the file is missing, a line is not ``BASE64 RANK`` (names file:line), or the ranks are not
            0..N-1 with all 256 single bytes among the tokens.
    """
    require_files([path], flag)
    ranks: dict[bytes, int] = {}
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
        raise UserError(f"{flag} {path}: the ranks of its {len(ranks)} tokens must be 0, 1, 2, ... without a gap")
    missing = [value for value in range(256) if bytes([value]) not in ranks]
    if missing:
        raise UserError(f"{flag} {path}: byte 0x{missing[0]:02x} has no token; every single byte needs one")
    return ranks


def require_tiktoken() -> None:
    """``UserError`` with the line to type when the ``tiktoken`` package is not installed."""
    if importlib.util.find_spec("tiktoken") is None:
        raise UserError("tiktoken: the package is not installed; pip install 'mhmoe_fairseq[tiktoken]'")


def check_tokenizer(tokenizer: str, vocab_size: int, ranks: Optional[Path]) -> None:
    """The flags ``--tokenizer``, ``--vocab-size`` and ``--tiktoken-ranks`` fit each other.

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
    require_files([ranks], "--tiktoken-ranks")
    require_tiktoken()


class TiktokenVocabulary:
    """Text to ranks and back with the ``tiktoken`` package.

    Args:
        path: rank file.
        pattern: regular expression that cuts the text before merging.
        flag: the flag that gave ``path``, for error messages.

    Raises:
        UserError: ``tiktoken`` is not installed, or the rank file is missing or malformed.
    """

    def __init__(self, path: str | Path, pattern: str = CL100K_PATTERN, flag: str = "--tiktoken-ranks"):
        ranks = load_ranks(Path(path), flag)
        require_tiktoken()
        import tiktoken

        self.num_ranks = len(ranks)
        self._encoding: Any = tiktoken.Encoding(
            name=Path(path).stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )

    def encode(self, text: str) -> list[int]:
        """Ranks of ``text``; nothing in the text is ever read as a special token."""
        return self._encoding.encode(text, disallowed_special=())

    def decode(self, ranks: Iterable[int]) -> str:
        """Text of ``ranks``; bytes that are not UTF-8 (a cut character) become U+FFFD."""
        return self._encoding.decode(list(ranks), errors="replace")


class TiktokenDictionaryVocabulary:
    """A rank file as a :class:`~mhmoe_fairseq.data.vocabulary.Vocabulary`: symbol = rank in decimal digits."""

    def __init__(self, path: Path):
        self._path = path
        self._vocabulary = TiktokenVocabulary(path)
        self.symbols = [str(rank) for rank in range(self._vocabulary.num_ranks)]

    def encode_lines(self, lines: list[str]) -> list[list[int]]:
        """Dictionary indices of each line (rank + 4), without an end mark."""
        return [[rank + NUM_SPECIALS for rank in self._vocabulary.encode(line)] for line in lines]

    def describe(self) -> dict[str, object]:
        """Number of ranks, and the rank file's name and hash."""
        return {
            "kind": "tiktoken", "ranks": self._vocabulary.num_ranks,
            "rank_file": self._path.name, "rank_file_sha256": sha256_of(self._path),
        }  # fmt: skip
