"""The dictionary and the tokenizer of the language model that is to be fine-tuned."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from ...common.errors import UserError
from ...data.sentencepiece_vocabulary import SentencePieceVocabulary
from ...data.tiktoken_vocabulary import TiktokenDictionaryVocabulary
from ...data.vocabulary import NUM_SPECIALS, Vocabulary

DICTIONARY, MODEL = "dict.txt", "sentencepiece.model"


@dataclass(frozen=True)
class LanguageModelText:
    """What turns text into the ids that a language model knows.

    Args:
        folder: prepared data of the language model.
        vocabulary: its tokenizer.
        files: those that the fine-tuning data copy, by name.
    """

    folder: Path
    vocabulary: Vocabulary
    files: tuple[str, ...]


def open_language_model_text(folder: Path, tiktoken_ranks: Optional[Path] = None) -> LanguageModelText:
    """Opens the dictionary and the tokenizer in ``folder`` and compares them.

    Args:
        folder: made by ``mhmoe prepare english`` or ``multilingual``, or by hand.
        tiktoken_ranks: rank file, where the model was trained with one.

    Raises:
        UserError: one of the two is missing, or they do not belong together.
    """
    dictionary = folder / DICTIONARY
    if not dictionary.is_file():
        raise UserError(f"--data {folder}: has no {DICTIONARY}; name the folder that the language model was trained on")
    files: tuple[str, ...] = (DICTIONARY,)
    vocabulary: Vocabulary
    if tiktoken_ranks is not None:
        tokenizer, vocabulary = tiktoken_ranks, TiktokenDictionaryVocabulary(tiktoken_ranks)
    else:
        tokenizer = folder / MODEL
        if not tokenizer.is_file():
            raise UserError(f"--data {folder}: has no {MODEL}; of a model with tiktoken give --tiktoken-ranks FILE")
        vocabulary = SentencePieceVocabulary(tokenizer)
        files = (DICTIONARY, MODEL)
    _compare(dictionary, tokenizer, vocabulary)
    return LanguageModelText(folder, vocabulary, files)


def _compare(file: Path, tokenizer: Path, vocabulary: Vocabulary) -> None:
    """The dictionary starts with the tokenizer's symbols, in their order; others, such as languages', may follow."""
    from fairseq.data import Dictionary

    symbols = Dictionary.load(str(file)).symbols[NUM_SPECIALS:]
    for index, symbol in enumerate(vocabulary.symbols):
        if index >= len(symbols) or symbols[index] != symbol:
            found = repr(symbols[index]) if index < len(symbols) else "its end"
            raise UserError(
                f"{file}:{index + 1}: {found} where {tokenizer} has {symbol!r}: the dictionary is another model's"
            )
