"""From a source in many languages to a prepared folder: clean, hold out, one vocabulary, binarise per language."""

from __future__ import annotations

import datetime
import time
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Mapping, Optional

import numpy as np

from ...common.errors import UserError
from ...common.files import atomic_open, sha256_of, write_json
from ...data.languages import LANGUAGES, XNLI_LANGUAGES, language_symbol
from ...data.sentencepiece_vocabulary import train_sentencepiece
from ...data.vocabulary import Vocabulary, build_dictionary, save_dictionary
from ..archives import Say
from ..binarize import binarize, count_text
from ..english import MODEL_FILE, load_vocabulary, tool_versions
from ..splits import unlike_shares
from ..workspace import Workspace, prepare_folder
from .aligned import write_aligned
from .assignment import Assignment
from .cleaning import CleaningSettings, LanguageCorpus, english_lines
from .corpus_source import MultilingualCorpus, MultilingualSource
from .sampling import language_shares, sample_lines
from .spot_check import spot_check

_RAW, _SPOT_CHECK = "raw", "spot_check.json"


@dataclass(frozen=True)
class MultilingualSettings:
    """How the languages are prepared; every field is part of the manifest's settings."""

    languages: tuple[str, ...]
    filter_lines: bool
    vocab_size: int = 8000
    vocab_sampling_alpha: float = 0.5
    tokenizer_model: str = "unigram"
    tokenizer_lines: int = 120_000
    tiktoken_ranks: Optional[Path] = None
    max_mb_per_language: Optional[float] = 2.0
    valid_fraction: float = 0.05
    test_fraction: float = 0.05
    seed: int = 1

    @property
    def cleaning(self) -> CleaningSettings:
        """The part that decides a language's text."""
        assignment = Assignment(self.seed, self.valid_fraction, self.test_fraction)
        max_bytes = None if self.max_mb_per_language is None else self.max_mb_per_language * 1e6
        return CleaningSettings(assignment, max_bytes, self.filter_lines)


class MultilingualPreparation:
    """One run over the stages of one workspace."""

    def __init__(
        self,
        source: MultilingualSource,
        settings: MultilingualSettings,
        workspace: Workspace,
        cache_dir: Path,
        say: Say,
    ):
        self._source = source
        self._settings = settings
        self._workspace = workspace
        self._cache_dir = cache_dir
        self._say = say
        self._partial = workspace.partial
        self._splits = settings.cleaning.assignment.splits
        self._english: Optional[Mapping[str, Any]] = None

    def run(self) -> dict[str, Any]:
        """Runs the stages that are not done yet and publishes the result; returns the manifest."""
        workspace, codes = self._workspace, self._settings.languages
        corpus = self._source.open(codes, self._partial / _RAW, workspace.stage, self._cache_dir, self._say)
        cleaning = {code: self._clean(code, corpus) for code in codes}
        checks = workspace.stage("spot check", [_SPOT_CHECK], self._spot_check)
        aligned_files = [f"aligned/{split}.jsonl" for split in self._splits if split != "train"]
        aligned = workspace.stage("align", aligned_files, self._align)
        if self._settings.tiktoken_ranks is None:
            workspace.stage("vocabulary", [MODEL_FILE], self._train_vocabulary)
        counts = {code: self._binarise(code) for code in codes}
        workspace.stage("dictionary", ["dict.txt"], self._make_dictionary)
        languages = {
            code: {
                "name": LANGUAGES[code].name,
                "sources": list(corpus.sources[code]),
                "missing": dict(corpus.missing[code]),
                "cleaning": cleaning[code],
                "spot_check": checks[code],
                "splits": counts[code],
            }
            for code in codes
        }
        manifest = {
            "format": 1,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "source": {"name": self._source.name, **corpus.provenance},
            "tokenizer": {**self._vocabulary.describe(), "language_symbols": self._language_symbols()},
            "languages": languages,
            "aligned": aligned or "none: no text has a key that is the same in two languages",
            "tools": tool_versions(),
        }
        return workspace.publish(manifest, self._outputs(aligned_files if aligned else []))

    def _outputs(self, aligned_files: list[str]) -> list[str]:
        outputs = ["dict.txt", _SPOT_CHECK, *aligned_files]
        if self._settings.tiktoken_ranks is None:
            outputs.append(MODEL_FILE)
        for code in self._settings.languages:
            for split in self._splits:
                outputs += [f"{code}/{split}.bin", f"{code}/{split}.idx", f"text/{code}/{split}.txt"]
        return outputs

    def _clean(self, code: str, corpus: MultilingualCorpus) -> dict[str, Any]:
        made = LanguageCorpus(LANGUAGES[code], self._settings.cleaning, self._partial)
        return self._workspace.stage(f"clean {code}", made.outputs(), partial(self._make_corpus, code, corpus, made))

    def _make_corpus(self, code: str, corpus: MultilingualCorpus, made: LanguageCorpus) -> dict[str, Any]:
        if self._english is None:
            needed = self._settings.filter_lines and corpus.has_english
            self._english = english_lines(corpus.passages("en")) if needed else {}
        record = made.make(corpus.passages(code), self._english)
        sizes = {split: (self._partial / "text" / code / f"{split}.txt").stat().st_size for split in self._splits}
        self._refuse_empty(code, sizes)
        kept = sum(record["bytes_by_family"].values()) / 1e6
        dropped = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in sorted(record["lines"].items()))
        self._say(f"clean: {code} {kept:.2f} MB ({', '.join(record['bytes_by_family'])}); {dropped}")
        for family, reason in corpus.missing[code].items():
            self._say(f"missing: {code} has no {family}: {reason}")
        warning = unlike_shares(
            sizes, valid_fraction=self._settings.valid_fraction, test_fraction=self._settings.test_fraction
        )
        if warning is not None:
            self._say(f"warning: {code}: {warning}")
        return record

    def _refuse_empty(self, code: str, sizes: Mapping[str, int]) -> None:
        shares = {"valid": self._settings.valid_fraction, "test": self._settings.test_fraction}
        for split in self._splits:
            if sizes[split]:
                continue
            if split == "train":
                others = [other for other, size in sizes.items() if size]
                where = f", all of its text is held out ({', '.join(others)})" if others else ""
                raise UserError(
                    f"--langs {code}: its training part is empty after cleaning{where}; documents are never divided "
                    "between parts, and end at an empty line unless --document-separator says otherwise (line, where "
                    "every line is one)"
                )
            raise UserError(
                f"--{split}-fraction {shares[split]:g}: no document of {code} is held out for {split}; give more (or "
                f"shorter) documents, a larger fraction, or 0 for no {split} part"
            )

    def _spot_check(self) -> dict[str, Any]:
        checks = {}
        for code in self._settings.languages:
            text = self._partial / "text" / code / "train.txt"
            checks[code] = spot_check(text, LANGUAGES[code], self._settings.seed)
            self._say(
                "spot check: {code} {lines} random lines, {foreign_script_lines} with a letter of a foreign script, "
                "{misfit_lines} mostly of one; letters {scripts}".format(code=code, **checks[code])
            )
        write_json(self._partial / _SPOT_CHECK, checks)
        return checks

    def _align(self) -> dict[str, Any]:
        """Counts by part and language; empty when nothing is aligned."""
        aligned = {}
        for split in self._splits:
            if split != "train":
                target = self._partial / "aligned" / f"{split}.jsonl"
                counts = write_aligned(self._partial / "held-out", split, self._settings.languages, target)
                aligned[split] = dict(counts)
        self._say(f"aligned: {', '.join(f'{split} {counts}' for split, counts in aligned.items())}")
        return aligned if any(aligned.values()) else {}

    def _train_vocabulary(self) -> None:
        start = time.monotonic()
        settings = self._settings
        texts = {code: self._partial / "text" / code / "train.txt" for code in settings.languages}
        sizes = {code: count_text(text) for code, text in texts.items()}
        characters = {code: size.characters for code, size in sizes.items()}
        shares = language_shares(characters, settings.vocab_sampling_alpha)
        num_lines = sum(size.lines for size in sizes.values())
        budget = sum(characters.values()) * min(1.0, settings.tokenizer_lines / num_lines)
        rates = {code: shares[code] * budget / characters[code] for code in texts}
        expected = round(sum(rates[code] * sizes[code].lines for code in texts))
        train_sentencepiece(
            sample_lines(texts, rates, settings.seed), expected, self._partial / MODEL_FILE,
            vocab_size=settings.vocab_size, model=settings.tokenizer_model, max_lines=expected, seed=settings.seed,
        )  # fmt: skip
        self._say(
            f"vocabulary: SentencePiece {settings.tokenizer_model}, {settings.vocab_size} pieces with byte fallback, "
            f"learnt on about {expected} lines of the training parts, {time.monotonic() - start:.1f} s; shares "
            + ", ".join(f"{code} {share:.3f}" for code, share in shares.items())
        )

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return load_vocabulary(self._partial, self._settings.tiktoken_ranks)

    def _language_symbols(self) -> list[str]:
        """Of XNLI's languages and of all prepared ones: the dictionary is the same whichever a model is given."""
        return [language_symbol(code) for code in dict.fromkeys([*XNLI_LANGUAGES, *self._settings.languages])]

    def _binarise(self, code: str) -> dict[str, dict[str, Any]]:
        outputs = [f"{code}/{split}.{kind}" for split in self._splits for kind in ("bin", "idx")]
        outputs.append(self._occurrences(code).relative_to(self._partial).as_posix())
        return self._workspace.stage(f"binarise {code}", outputs, partial(self._make_binary, code))

    def _occurrences(self, code: str) -> Path:
        return self._partial / "occurrences" / f"{code}.npy"

    def _make_binary(self, code: str) -> dict[str, dict[str, Any]]:
        recorded = {}
        for split in self._splits:
            text = self._partial / "text" / code / f"{split}.txt"
            counts, occurrences = binarize(text, self._partial / code / split, self._vocabulary)
            recorded[split] = counts.as_dict()
            recorded[split]["chars"] = recorded[split].pop("characters")
            if split == "train":
                with atomic_open(self._occurrences(code)) as stream:
                    np.save(stream, occurrences)
        self._say(
            f"binarise: {code} "
            + "; ".join(
                f"{split} {part['documents']} documents, {part['lines']} lines, {part['bytes'] / 1e6:.2f} MB, "
                f"{part['tokens']} tokens"
                for split, part in recorded.items()
            )
        )
        return recorded

    def _make_dictionary(self) -> None:
        total = sum(np.load(self._occurrences(code)) for code in self._settings.languages)
        dictionary = build_dictionary(self._vocabulary.symbols, np.asarray(total), self._language_symbols())
        save_dictionary(dictionary, self._partial / "dict.txt")


def prepare_multilingual(
    source: MultilingualSource,
    settings: MultilingualSettings,
    dest: Path,
    *,
    cache_dir: Path,
    overwrite: bool,
    say: Say,
) -> dict[str, Any]:
    """Prepares ``source`` into ``dest`` and returns the manifest; does nothing if that was done before.

    Raises:
        UserError: other settings already in ``dest``, bad input, no room, a client that is missing or fails.
    """
    identity = {"source": {"name": source.name, **source.identity(settings.languages)}, **asdict(settings)}
    identity["langs"] = list(identity.pop("languages"))
    ranks = identity.pop("tiktoken_ranks")
    if ranks is not None:
        identity["tiktoken_ranks"] = sha256_of(ranks)
        for of_sentencepiece in ("vocab_size", "vocab_sampling_alpha", "tokenizer_model", "tokenizer_lines"):
            del identity[of_sentencepiece]
    return prepare_folder(
        dest, identity, lambda workspace: MultilingualPreparation(source, settings, workspace, cache_dir, say).run(),
        overwrite=overwrite, say=say,
    )  # fmt: skip
