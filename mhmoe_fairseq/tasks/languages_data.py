"""A data folder of several languages: which there are, checks before anything is read, characters per token."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from fairseq.data import Dictionary, MonolingualDataset

from ..common.errors import UserError
from ..common.files import read_json, sha256_of
from ..data.languages import language_symbol

_CHECKED_BLOCKS = 20


def find_languages(folder: Path, langs: str) -> list[str]:
    """The languages of ``--langs``, else every folder with a training set; sorted.

    Raises:
        UserError: naming a language that is given twice or has no folder, or saying that there is none at all.
    """
    available = sorted(path.parent.name for path in folder.glob("*/*.idx"))
    if not langs:
        found = sorted(path.parent.name for path in folder.glob("*/train.idx"))
        if not found:
            raise UserError(f"{folder} has no language: no folder in it, such as {folder}/de, has a train.idx")
        return found
    asked = [language.strip() for language in langs.split(",")]
    for language in asked:
        if asked.count(language) > 1:
            raise UserError(f"--langs ({langs}) names {language} twice")
        if language not in available:
            there = ", ".join(dict.fromkeys(available)) or "none"
            raise UserError(f"--langs ({langs}): {folder} has no binarised text of {language!r}; it has {there}")
    return sorted(asked)


def check_languages(folder: Path, languages: list[str], dictionary: Path) -> None:
    """The languages' files are their own, and of the dictionary.

    Args:
        folder: the data, or one shard of them.
        dictionary: the file that is read.

    Raises:
        UserError: naming two languages with the same text, or another dictionary.
    """
    for split in ("train", "valid", "test"):
        texts = {language: folder / language / f"{split}.bin" for language in languages}
        texts = {language: path for language, path in texts.items() if path.is_file()}
        for one, other in itertools.combinations(texts, 2):
            if _have_same_content(texts[one], texts[other]):
                raise UserError(f"{texts[one]} and {texts[other]} are the same text: {one} and {other} need their own")
    used = sha256_of(dictionary)
    for language in languages:
        own = folder / language / "dict.txt"
        if own.is_file() and sha256_of(own) != used:
            raise UserError(f"{own} differs from {dictionary}: all languages share one dictionary")
    recorded = _manifest(folder).get("files", {}).get("dict.txt", {}).get("sha256", used)
    if recorded != used:
        raise UserError(f"{dictionary} is not the dictionary that {folder} was binarised with, says its manifest.json")


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    return read_json(path) if path.is_file() else {}


def _have_same_content(one: Path, other: Path) -> bool:
    if one.samefile(other):
        return True
    size = one.stat().st_size
    return size > 0 and size == other.stat().st_size and sha256_of(one) == sha256_of(other)


def check_words(part: MonolingualDataset, dictionary: Dictionary, name: str) -> None:
    """A language is in the dictionary's words: of unknown ones, a model would learn to predict ``<unk>``.

    Raises:
        UserError: if most words of its first blocks are unknown.
    """
    words = torch.cat([part[block]["target"] for block in range(min(len(part), _CHECKED_BLOCKS))])
    unknown = words.eq(dictionary.unk()).float().mean().item()
    if unknown > 0.5:
        raise UserError(f"{name}: {unknown:.0%} of its words are unknown; dict.txt is a dictionary of other languages")


def language_symbols(dictionary: Dictionary, languages: list[str]) -> dict[str, int]:
    """Language -> its symbol's number in the dictionary.

    Raises:
        UserError: naming a symbol that the dictionary lacks.
    """
    for language in languages:
        if language_symbol(language) not in dictionary.indices:
            raise UserError(
                f"--mhmoe-language-token: dict.txt has no {language_symbol(language)}: prepare the data with "
                "`mhmoe prepare multilingual`, whose dictionaries hold a symbol for every language"
            )
    return {language: dictionary.index(language_symbol(language)) for language in languages}


def characters_of(folder: Path, split: str, tokens: dict[str, int]) -> dict[str, float]:
    """Language -> characters that ``tokens`` targets of its text stand for, as far as the manifest tells.

    ``--sample-break-mode complete_doc`` leaves out the end mark of each empty line, one token and one character. A
    language whose number of tokens cannot be explained so is left out: its text is not the manifest's.
    """
    counts = _manifest(folder).get("languages", {})
    found = {}
    for language, evaluated in tokens.items():
        counted = counts.get(language, {}).get("splits", {}).get(split)
        if counted is None:
            continue
        left_out = counted["tokens"] - evaluated
        if 0 <= left_out < max(counted["documents"], 1):
            found[language] = float(counted["chars"] - left_out)
    return found
