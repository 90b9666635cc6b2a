"""A tokenizer of the ``tokenizers`` package that gives the ids of this package's own scoring.

A text becomes ``</s>`` (of models trained with ``--add-bos-token`` ``<s>``), then its lines, cleaned as by ``mhmoe
prepare``, with ``</s>`` between them. What is different stands in docs/export.md.
"""

import importlib
from pathlib import Path
from typing import Any

from fairseq.data import Dictionary

from ...common.errors import UserError
from ...data.documents import SPACE_PIECE
from ...data.languages import LANGUAGES, language_symbol
from ...data.vocabularies import CL100K_PATTERN, NUM_SPECIALS, RANKS_FILE, find_vocabulary, load_ranks, open_model

_NEVER = -1e6  # the score of pieces that no text is cut into
_LINE_ENDS = "\r\n|[\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]"
_REMOVED = "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff]"
_SPACES = "[ \t\x1f\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]+"
_SENTINEL = "\ufb01 \uff21 \u2460 Straße"  # what Unicode's compatible normalisations change


def require_packages() -> None:
    """Raise ``UserError`` with the line that installs what is missing."""
    try:
        importlib.import_module("tokenizers")
    except ImportError:
        raise UserError("tokenizers is not installed: pip install 'mhmoe_fairseq[hf]'") from None


def build_tokenizer(dictionary: Dictionary, folder: Path, start: str, end: str = "") -> Any:
    """Returns the ``tokenizers.Tokenizer`` of a dictionary.

    Args:
        folder: where the vocabulary's file lies; without one the dictionary has whole words.
        start: the symbol that begins every text.
        end: the symbol that ends every text; empty for none.

    Raises:
        UserError: if dictionary and vocabulary do not belong together, or the model normalises text by itself.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, normalizers, processors

    path = find_vocabulary(folder, dictionary.symbols[NUM_SPECIALS:])
    if path is None:
        model, cut, decoder = _words(dictionary)
    else:
        model, cut, decoder = (_tiktoken if path.name == RANKS_FILE else _sentencepiece)(dictionary, path)
    tokenizer = Tokenizer(model)
    replaced = (
        (SPACE_PIECE, "_"), (Regex(_LINE_ENDS), "\n"), (Regex(_REMOVED), ""), None, (Regex(_SPACES), " "),
        (Regex(" ?\n ?"), "\n"), (Regex(r"\A +| +\z"), ""), ("\n", "</s>"),
    )  # fmt: skip
    steps = [normalizers.NFC() if pair is None else normalizers.Replace(*pair) for pair in replaced]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken("</s>", normalized=True, special=True)])
    named = ["<s>", "<pad>", "<unk>", *filter(dictionary.__contains__, map(language_symbol, LANGUAGES))]
    tokenizer.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in named])
    behind = f" {end}" if end else ""
    symbols = [(symbol, dictionary.index(symbol)) for symbol in {start, end} - {""}]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A{behind}", pair=f"{start} $A $B:1{behind}", special_tokens=symbols
    )
    return tokenizer


def _words(dictionary: Dictionary) -> tuple[Any, Any, Any]:
    from tokenizers import models, pre_tokenizers

    vocabulary = {word: index for index, word in enumerate(dictionary.symbols)}
    return models.WordLevel(vocabulary, unk_token="<unk>"), pre_tokenizers.WhitespaceSplit(), None


def _sentencepiece(dictionary: Dictionary, path: Path) -> tuple[Any, Any, Any]:
    from tokenizers import decoders, models, pre_tokenizers

    opened = open_model(path)
    if opened.normalize(_SENTINEL) != SPACE_PIECE + _SENTINEL.replace(" ", SPACE_PIECE):
        raise UserError(f"{path} normalises text by itself: only models that do not, as mhmoe prepare's, are exported")
    scores = {
        opened.id_to_piece(number): opened.get_score(number)
        for number in range(opened.vocab_size())
        if not any(kind(number) for kind in (opened.is_control, opened.is_unknown, opened.is_byte, opened.is_unused))
    }
    if not scores.keys() & set(dictionary.symbols):
        raise UserError(f"{path} is not the model of the dictionary: none of its pieces is in dict.txt")
    has_bytes = all(f"<0x{value:02X}>" in dictionary for value in range(256))
    if sorted(scores.values(), reverse=True) == [-float(rank) for rank in range(len(scores))]:
        vocabulary = {word: index for index, word in enumerate(dictionary.symbols)}
        known = {piece: score for piece, score in scores.items() if piece in vocabulary}
        model: models.Model = models.BPE(
            vocabulary, _merges(known), unk_token="<unk>", fuse_unk=True, byte_fallback=has_bytes
        )
    else:
        weighted = [(word, scores.get(word, _NEVER)) for word in dictionary.symbols]
        model = models.Unigram(weighted, unk_id=dictionary.unk(), byte_fallback=has_bytes)
    steps = [decoders.Replace(SPACE_PIECE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    cut = pre_tokenizers.Metaspace(replacement=SPACE_PIECE, prepend_scheme="always", split=False)
    return model, cut, decoders.Sequence(steps)


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, the best pieces first."""
    return [
        (piece[:cut], piece[cut:])
        for piece in sorted(scores, key=lambda piece: -scores[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]


def _tiktoken(dictionary: Dictionary, path: Path) -> tuple[Any, Any, Any]:
    from tokenizers import Regex, decoders, models, pre_tokenizers

    ranks = load_ranks(path)
    words = dictionary.symbols[NUM_SPECIALS : NUM_SPECIALS + len(ranks)]
    if words != [str(rank) for rank in range(len(ranks))]:
        raise UserError(f"{path} is not of the dictionary: its {len(ranks):,} tokens are not those of dict.txt")
    spelled = _spelled_bytes()

    def spell(token: bytes) -> str:
        return "".join(spelled[byte] for byte in token)

    vocabulary = {spell(token): rank + NUM_SPECIALS for token, rank in ranks.items()}
    free = [index for index in range(len(dictionary)) if not NUM_SPECIALS <= index < NUM_SPECIALS + len(ranks)]
    vocabulary |= {dictionary.symbols[index]: index for index in free}
    halves = (_last_merge(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1)
    merges = [(spell(pair[0]), spell(pair[1])) for pair in halves if pair is not None]
    model = models.BPE(vocabulary, merges, ignore_merges=True)
    split = pre_tokenizers.Split(Regex(CL100K_PATTERN), "isolated")
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return model, pre_tokenizers.Sequence([split, by_bytes]), decoders.ByteLevel()


def _spelled_bytes() -> list[str]:
    """GPT-2's character for each byte, as ``ByteLevel`` spells it: printable ones themselves."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that merging in the order of ranks makes ``token`` of; None where more or none are left."""
    parts = [token[index : index + 1] for index in range(len(token))]
    while len(parts) > 2:
        found = [(ranks.get(one + other, ranks[token]), at) for at, (one, other) in enumerate(zip(parts, parts[1:]))]
        rank, at = min(found)
        if rank >= ranks[token]:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1])
