"""Language modelling in several languages: temperature sampling, and figures for every language."""

import copy
import functools
import logging
import os
from dataclasses import dataclass, field  # fairseq reads the field types: no postponed annotations here
from typing import Any

from fairseq.data import MonolingualDataset
from fairseq.models import BaseFairseqModel
from fairseq.tasks import register_task
from torch import Tensor, nn

from ..common.errors import UserError
from ..criterions.moe_cross_entropy import MoECrossEntropyCriterion
from ..data.datasets.languages import LanguageContextDataset, LanguagesDataset, SampledLanguagesDataset
from .language_metrics import language_sums, log_languages
from .language_modeling import MHMoELanguageModelingConfig, MHMoELanguageModelingTask, data_folders
from .languages_data import characters_of, check_languages, check_words, find_languages, language_symbols

logger = logging.getLogger(__name__)


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

    @classmethod
    def setup_task(cls, args: Any, **kwargs: Any) -> "MHMoEMultilingualLanguageModelingTask":
        """Load the dictionary.

        Raises:
            FileNotFoundError: if the data folder or its dictionary is missing.
            ValueError: naming the flag, its value and the rule.
        """
        if args.mhmoe_language_token and args.add_bos_token:
            raise UserError("--mhmoe-language-token and --add-bos-token exclude each other: both begin a block")
        return super().setup_task(args, **kwargs)

    def build_model(self, args: Any, from_checkpoint: bool = False) -> BaseFairseqModel:
        """Build the model; for training, look for the languages first.

        Raises:
            ValueError: naming the flag or the language, its value and the rule.
        """
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
        return language_symbols(self.dictionary, self.languages) if self.args.mhmoe_language_token else {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint says of the task."""
        return {**super().state_dict(), "language_token": bool(self.args.mhmoe_language_token)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called when a checkpoint is opened for evaluation.

        Raises:
            UserError: if blocks would begin otherwise than in the model's training.
        """
        trained = state_dict.get("language_token", False)
        if trained != bool(self.args.mhmoe_language_token):
            used, flag = ("with", "add") if trained else ("without", "leave out")
            raise UserError(f"the model was trained {used} --mhmoe-language-token: {flag} the flag")
        super().load_state_dict(state_dict)

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any) -> None:
        """Check and load a split of all languages, or, as ``valid_de``, of one.

        Raises:
            FileNotFoundError, ValueError: naming the file that is missing, truncated, empty or of another dictionary.
        """
        base, chosen = self.split_of(split)
        parts = {language: self._load_part(language, base, epoch, combine, **kwargs) for language in chosen}
        numbers = {language: number for number, language in enumerate(self.languages)}
        if split == "train":
            self.datasets[split] = SampledLanguagesDataset(
                parts,
                numbers,
                self._symbols,
                alpha=self.args.multilang_sampling_alpha,
                seed=self.args.seed,
                num_shards=len(data_folders(self.args)),
            )
        else:
            self.datasets[split] = LanguagesDataset(parts, numbers, self._symbols, self._characters(base, parts))

    def split_of(self, split: str) -> tuple[str, list[str]]:
        """The files' name and the languages of a split: ``valid_de`` -> ``valid``, ``["de"]``.

        Raises:
            UserError: if no language has such files.
        """
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
        check_words(part, self.dictionary, f"{split} of {language}")
        return part

    def _characters(self, split: str, parts: dict[str, MonolingualDataset]) -> dict[str, float]:
        folder = data_folders(self.args)[0]
        characters = characters_of(folder, split, {name: int(part.sizes.sum()) for name, part in parts.items()})
        unknown = [language for language in parts if language not in characters]
        if unknown:
            reason = f"{folder / 'manifest.json'} does not tell the characters of {', '.join(unknown)}"
            logger.info(f"{split}: no bits per character, since {reason}")
        return characters

    def evaluate_batch(self, sample: dict, model: nn.Module, criterion: Any) -> tuple[Tensor, Any, dict]:
        """One batch of a validation, its loss summed for every language too if the criterion is ours."""
        if not isinstance(criterion, MoECrossEntropyCriterion):
            return super().evaluate_batch(sample, model, criterion)
        losses, sample_size, log = criterion(model, sample, reduce=False)
        sums = language_sums(sample, losses, len(self.languages), self.target_dictionary.pad())
        return losses.sum(), sample_size, {**log, **sums}

    def reduce_metrics(self, logging_outputs: list[dict[str, Any]], criterion: Any) -> None:
        """fairseq's and the criterion's figures, and each language's."""
        super().reduce_metrics(logging_outputs, criterion)
        log_languages(self.languages, logging_outputs)

    def with_context(self, dataset: LanguagesDataset, context_window: int) -> LanguageContextDataset:
        """The blocks, each read with as many tokens before it, which never come from another language."""
        return LanguageContextDataset(
            dataset, self.args.tokens_per_sample, context_window, self.source_dictionary.pad()
        )
