"""Language modelling in several languages: temperature sampling, and metrics of every language."""

import copy
import filecmp
import functools
import itertools
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field  # fairseq reads the field types: no postponed annotations here
from pathlib import Path
from typing import Any

import torch
from fairseq import utils
from fairseq.data import MonolingualDataset
from fairseq.logging import metrics
from fairseq.models import BaseFairseqModel
from fairseq.tasks import register_task
from torch import Tensor, nn

from ..common.errors import UserError
from ..common.files import sha256_of
from ..criterions.base import total
from ..criterions.moe_cross_entropy import MoECrossEntropyCriterion
from ..data.binarised import line_sizes
from ..data.datasets.languages import LanguageContextDataset, LanguagesDataset, SampledLanguagesDataset
from ..data.identity import read_manifest
from ..data.languages import language_symbol
from .language_modeling import MHMoELanguageModelingConfig, MHMoELanguageModelingTask, data_folders

logger = logging.getLogger(__name__)

_CHECKED_BLOCKS = 20
_SUMS = ("language_loss", "language_tokens", "language_characters")
_PRIORITY = 700  # of languages' metrics: behind what a validation logs without languages


@dataclass
class MHMoEMultilingualLanguageModelingConfig(MHMoELanguageModelingConfig):
    """The options of ``mhmoe_language_modeling``, for every language alike, and these."""

    langs: str = field(
        default="",
        metadata={"help": "comma-separated languages, folders of the data (default: all that have a training set)"},
    )
    multilang_sampling_alpha: float = field(
        default=1.0,
        metadata={
            "help": "an epoch holds blocks of language l in proportion to (n_l / N) ** alpha: 1 as many as there are, "
            "0 equally many of each language"
        },
    )
    mhmoe_language_token: bool = field(
        default=False,
        metadata={
            "help": "begin every block with the language's symbol, such as __de__, in place of the end mark or last "
            "token before it; never a target, so that perplexities compare"
        },
    )


@register_task("mhmoe_multilingual_language_modeling", dataclass=MHMoEMultilingualLanguageModelingConfig)
class MHMoEMultilingualLanguageModelingTask(MHMoELanguageModelingTask):
    """``mhmoe_language_modeling`` on a folder with a folder for every language, and one dictionary for all.

    Splits: ``train``, sampled by ``--multilang-sampling-alpha``; ``valid``, ``test`` and others, all languages'
    blocks; ``valid_de`` and so on, one language's. Validating on several languages logs ``ppl_de`` and, where the
    data's manifest.json tells the characters, ``bpc_de`` (bits per character) of each.

    The dictionary depends on neither ``--langs`` nor ``--mhmoe-language-token``.
    """

    context_type = LanguageContextDataset

    @classmethod
    def check_args(cls, args: Any) -> None:
        """Refuse flags before anything is loaded, with a ``UserError`` that names flag, value and rule."""
        if args.mhmoe_language_token and args.add_bos_token:
            raise UserError("--mhmoe-language-token and --add-bos-token exclude each other: both begin a block")
        super().check_args(args)

    def build_model(self, args: Any, from_checkpoint: bool = False) -> BaseFairseqModel:
        """Build the model; for training, look for the languages first."""
        if not from_checkpoint:
            logger.info(f"{len(self.languages)} languages: {', '.join(self.languages)}")
        return super().build_model(args, from_checkpoint)

    @functools.cached_property
    def languages(self) -> list[str]:
        """Those of ``--langs``, or all; looked for when first needed, since to generate text a dictionary will do."""
        folders = data_folders(self.args)
        languages = find_languages(folders[0], self.args.langs)
        for folder in folders:
            check_languages(folder, languages, folders[0] / "dict.txt")
        return languages

    @functools.cached_property
    def _symbols(self) -> dict[str, int]:
        """Language -> its symbol's index in the dictionary; empty without ``--mhmoe-language-token``."""
        symbols = {}
        for language in self.languages if self.args.mhmoe_language_token else ():
            symbol = language_symbol(language)
            if symbol not in self.dictionary:
                raise UserError(
                    f"--mhmoe-language-token: dict.txt has no {symbol}: prepare the data with "
                    "`mhmoe prepare multilingual`, whose dictionaries hold a symbol for every language"
                )
            symbols[language] = self.dictionary.index(symbol)
        return symbols

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint says of the task."""
        return {**super().state_dict(), "language_token": bool(self.args.mhmoe_language_token)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint whose model was trained on blocks that begin otherwise."""
        trained = state_dict.get("language_token", False)
        if trained != bool(self.args.mhmoe_language_token):
            used, flag = ("with", "add") if trained else ("without", "leave out")
            raise UserError(f"the model was trained {used} --mhmoe-language-token: {flag} the flag")
        super().load_state_dict(state_dict)

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any) -> None:
        """Check and load a split of all languages, or, as ``valid_de``, of one; an error names the file."""
        base, chosen = self.split_of(split)
        parts = {language: self._load_part(language, base, epoch, combine, **kwargs) for language in chosen}
        read = parts, {language: number for number, language in enumerate(self.languages)}, self._symbols
        if split == "train":
            sampling = {"alpha": self.args.multilang_sampling_alpha, "num_shards": len(data_folders(self.args))}
            self.datasets[split] = SampledLanguagesDataset(*read, seed=self.args.seed, **sampling)
        else:
            self.datasets[split] = LanguagesDataset(*read, self._characters(base, parts))
        if self.domains is not None and self.names_domains:
            self.datasets[split].experts = {language: self.expert_of_domain(language) for language in parts}

    def domains_of_data(self) -> list[str]:
        """Return the languages."""
        return self.languages

    def domain_tokens(self) -> dict[str, int]:
        """Return how many training tokens each language has."""
        folder = data_folders(self.args)[0]
        return {language: int(line_sizes(folder / language / "train").sum()) for language in self.languages}

    def parts_of(self, split: str) -> dict[str, str]:
        """Return the languages of a split, each with the name of its own split."""
        base, languages = self.split_of(split)
        return {language: f"{base}_{language}" for language in languages}

    def split_of(self, split: str) -> tuple[str, list[str]]:
        """Return the files' name and the languages of a split: ``valid_de`` -> ``valid``, ``["de"]``."""
        for language in self.languages:
            if split.endswith(f"_{language}"):
                return split.removesuffix(f"_{language}"), [language]
        folder = data_folders(self.args)[0]
        if not any((folder / language / f"{split}.idx").is_file() for language in self.languages):
            raise UserError(
                f"no split {split!r}: no language's folder in {folder} has {split}.idx, and no language that is read "
                f"({', '.join(self.languages)}) ends its name"
            )
        return split, self.languages

    def _load_part(self, language: str, split: str, *args: Any, **kwargs: Any) -> MonolingualDataset:
        """One language, as the task of one language loads it."""
        settings = copy.deepcopy(self.args)
        settings.data = os.pathsep.join(str(folder / language) for folder in data_folders(self.args))
        task = MHMoELanguageModelingTask(settings, self.dictionary, self.output_dictionary, self.targets)
        task.load_dataset(split, *args, **kwargs)
        part = task.dataset(split)
        words = torch.cat([part[block]["target"] for block in range(min(len(part), _CHECKED_BLOCKS))])
        unknown = words.eq(self.dictionary.unk()).float().mean().item()
        if unknown > 0.5:  # a model would learn to predict <unk>
            problem = f"{unknown:.0%} of its words are unknown; dict.txt is a dictionary of other languages"
            raise UserError(f"{split} of {language}: {problem}")
        return part

    def _characters(self, split: str, parts: dict[str, MonolingualDataset]) -> dict[str, float]:
        """Language -> characters that the targets of its text stand for, as far as the manifest tells.

        ``--sample-break-mode complete_doc`` leaves out the end mark of each empty line, one token and one character. A
        language whose number of tokens cannot be explained so is left out: its text is not the manifest's.
        """
        folder = data_folders(self.args)[0]
        counts = read_manifest(folder).get("languages", {})
        found = {}
        for language, part in parts.items():
            counted = counts.get(language, {}).get("splits", {}).get(split)
            left_out = counted["tokens"] - int(part.sizes.sum()) if counted else -1
            if counted and 0 <= left_out < max(counted["documents"], 1):
                found[language] = float(counted["chars"] - left_out)
        unknown = ", ".join(sorted(parts.keys() - found.keys()))
        if unknown:
            reason = f"{folder / 'manifest.json'} does not tell the characters of {unknown}"
            logger.info(f"{split}: no bits per character, since {reason}")
        return found

    def evaluate_batch(self, sample: dict, model: nn.Module, criterion: Any) -> tuple[Tensor, Any, dict]:
        """Return the outcome of one batch, its loss summed for every language too if the criterion is ours."""
        if not isinstance(criterion, MoECrossEntropyCriterion):
            return super().evaluate_batch(sample, model, criterion)
        losses, sample_size, log = criterion(model, sample, reduce=False)
        sums = language_sums(sample, losses, len(self.languages), self.target_dictionary.pad())
        return losses.sum(), sample_size, {**log, **sums}

    def reduce_metrics(self, logging_outputs: list[dict[str, Any]], criterion: Any) -> None:
        """fairseq's and the criterion's metrics, and each language's."""
        super().reduce_metrics(logging_outputs, criterion)
        log_languages(self.languages, logging_outputs)


def find_languages(folder: Path, langs: str) -> list[str]:
    """Return the languages of ``--langs``, else all with a training set, sorted; a ``UserError`` names a bad one."""
    if not langs:
        found = sorted(path.parent.name for path in folder.glob("*/train.idx"))
        if not found:
            raise UserError(f"{folder} has no language: no folder in it, such as {folder}/de, has a train.idx")
        return found
    available = sorted({path.parent.name for path in folder.glob("*/*.idx")})
    asked = [language.strip() for language in langs.split(",")]
    for language in asked:
        if asked.count(language) > 1:
            raise UserError(f"--langs ({langs}) names {language} twice")
        if language not in available:
            there = ", ".join(available) or "none"
            raise UserError(f"--langs ({langs}): {folder} has no binarised text of {language!r}; it has {there}")
    return sorted(asked)


def check_languages(folder: Path, languages: list[str], dictionary: Path) -> None:
    """Refuse, with a ``UserError``, two languages with the same text in a shard, or another dictionary than is read."""
    for split in ("train", "valid", "test"):
        files = {language: folder / language / f"{split}.bin" for language in languages}
        texts = {language: file for language, file in files.items() if file.is_file() and file.stat().st_size}
        for one, other in itertools.combinations(texts, 2):
            if filecmp.cmp(texts[one], texts[other], shallow=False):
                raise UserError(f"{texts[one]} and {texts[other]} are the same text: {one} and {other} need their own")
    for language in languages:
        own = folder / language / "dict.txt"
        if own.is_file() and not filecmp.cmp(own, dictionary, shallow=False):
            raise UserError(f"{own} differs from {dictionary}: all languages share one dictionary")
    used = sha256_of(dictionary)
    recorded = read_manifest(folder).get("files", {}).get("dict.txt", {}).get("sha256", used)
    if recorded != used:
        raise UserError(f"{dictionary} is not the dictionary that {folder} was binarised with, says its manifest.json")


def language_sums(sample: dict[str, Any], losses: Tensor, num_languages: int, pad: int) -> dict[str, Tensor]:
    """Additive sums for every language, ``(num_languages,)`` each.

    Args:
        sample: a batch with ``target``, ``(B, S)``, ``languages``, ``(B,)``, and perhaps ``characters``, ``(B,)``.
        losses: cross entropy of every target in nats, 0 where padded; B * S values.
    """
    target, languages = sample["target"], sample["languages"]
    rows = len(languages)  # --pad-to-fixed-bsz adds rows of padding behind them
    by_row = {
        "language_loss": losses.detach().view(target.shape)[:rows].sum(1, dtype=torch.float64),
        "language_tokens": target[:rows].ne(pad).sum(1).double(),
    }
    if "characters" in sample:
        by_row["language_characters"] = sample["characters"].double()
    zeros = by_row["language_loss"].new_zeros(num_languages)
    return {key: zeros.index_add(0, languages, values) for key, values in by_row.items()}


def log_languages(languages: list[str], logging_outputs: list[dict[str, Any]]) -> None:
    """Log ``ppl_de`` and, where characters are known, ``bpc_de`` of every language, and ``bpc`` of all together."""
    # Hidden meters (leading underscore) add the sums up; metrics come from the sums of the whole set.
    sums = {key: total(logging_outputs, key) for key in _SUMS if any(key in log for log in logging_outputs)}
    for key, values in sums.items():
        metrics.log_scalar(f"_{key}", values, weight=1)
    has_characters = "language_characters" in sums
    for index, language in enumerate(languages if sums else []):
        if sums["language_tokens"][index] > 0:
            metrics.log_derived(f"ppl_{language}", functools.partial(_perplexity, index), _PRIORITY)
            if has_characters:
                metrics.log_derived(f"bpc_{language}", functools.partial(_bits_per_character, [index]), _PRIORITY)
    if has_characters:
        metrics.log_derived("bpc", functools.partial(_bits_per_character, range(len(languages))), _PRIORITY)


def _perplexity(language: int, meters: Any) -> float:
    return utils.get_perplexity(_bits([language], "tokens", meters))


def _bits_per_character(languages: Sequence[int], meters: Any) -> float:
    return round(_bits(languages, "characters", meters), 4)


def _bits(languages: Sequence[int], per: str, meters: Any) -> float:
    nats, count = (sum(float(meters[f"_language_{key}"].sum[index]) for index in languages) for key in ("loss", per))
    return nats / count / math.log(2)
