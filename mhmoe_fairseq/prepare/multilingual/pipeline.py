"""Text in many languages: cleaned, the same keys held out in all of them, one vocabulary, binarised per language."""

import random
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, Iterator, Mapping, Optional

import numpy as np

from ...common.errors import UserError
from ...common.files import atomic_open, json_line, write_json
from ...data.documents import SeenTexts
from ...data.languages import LANGUAGES, XNLI_LANGUAGES, language_symbol
from ..base import DICTIONARY, CorpusPreparation
from ..binarize import binarize, count_text, iter_lines
from ..sources.base import MultilingualCorpus, read_passages
from ..splits import unlike_shares
from .cleaning import LanguageCorpus, MultilingualSettings, english_lines, spot_check

_SPOT_CHECK = "spot_check.json"


class MultilingualPreparation(CorpusPreparation[MultilingualSettings]):
    """Prepares a source of :data:`~mhmoe_fairseq.prepare.sources.base.MULTILINGUAL_SOURCES`."""

    kind = "multilingual"
    _english: Optional[Mapping[str, SeenTexts]] = None

    def source_identity(self) -> dict[str, Any]:
        """Returns what tells the source's text in these languages from another."""
        return self.source.identity(self.settings.languages)

    def now_available(self, manifest: dict[str, Any]) -> list[str]:
        """Returns what the source could not fetch then and can now."""
        return self.source.now_available(manifest["source"], self.downloads)

    @property
    def extra_symbols(self) -> tuple[str, ...]:
        """Symbols of XNLI's languages and all prepared ones: the dictionary is the same whichever a model is given."""
        return tuple(map(language_symbol, dict.fromkeys([*XNLI_LANGUAGES, *self.settings.languages])))

    def make(self) -> dict[str, Any]:
        """Runs the stages that are not done yet and publishes the result; returns the manifest."""
        codes = self.settings.languages
        corpus = self.source.open(codes, self.partial / "raw", self.stage, self.downloads, self.say)
        cleaning = {code: self._clean(code, corpus) for code in codes}
        checks = self.stage("spot check", [_SPOT_CHECK], self._spot_check)
        aligned_files = [f"aligned/{split}.jsonl" for split in self.settings.splits[1:]]
        aligned = self.stage("align", aligned_files, self._align)
        outputs = [DICTIONARY, _SPOT_CHECK, *(aligned_files if aligned else [])]
        outputs.append(self.make_vocabulary(self._train_vocabulary))
        counts = {}
        for code in codes:
            binaries = [*self._binaries(code), f"occurrences/{code}.npy"]
            counts[code] = self.stage(f"binarise {code}", binaries, partial(self._binarise_language, code))
        self.stage("dictionary", [DICTIONARY], self._make_dictionary)
        for code in codes:
            outputs += [*self._binaries(code), *(f"text/{code}/{split}.txt" for split in self.settings.splits)]
        languages = {
            code: {
                "name": LANGUAGES[code].name, "sources": list(corpus.sources[code]),
                "missing": dict(corpus.missing[code]), "cleaning": cleaning[code], "spot_check": checks[code],
                "splits": counts[code],
            }
            for code in codes
        }  # fmt: skip
        entries = {
            "source": {"name": self.source.name, **corpus.provenance},
            "tokenizer": {**self.vocabulary.describe(), "language_symbols": list(self.extra_symbols)},
            "languages": languages,
            "aligned": aligned or "none: no text has a key that is the same in two languages",
        }
        return self.publish(entries, outputs)

    def _text(self, code: str, split: str = "train") -> Path:
        return self.partial / "text" / code / f"{split}.txt"

    def _clean(self, code: str, corpus: MultilingualCorpus) -> dict[str, Any]:
        made = LanguageCorpus(LANGUAGES[code], self.partial, self.settings)
        return self.stage(f"clean {code}", made.outputs(), partial(self._make_corpus, code, corpus, made))

    def _make_corpus(self, code: str, corpus: MultilingualCorpus, made: LanguageCorpus) -> dict[str, Any]:
        if self._english is None:
            self._english = english_lines(corpus.passages("en")) if self.settings.filter_lines else {}
        record = made.make(corpus.passages(code), self._english)
        sizes = {split: self._text(code, split).stat().st_size for split in self.settings.splits}
        self._refuse_empty(code, sizes, made.capped)
        kept = sum(record["bytes_by_family"].values()) / 1e6
        dropped = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in sorted(record["lines"].items()))
        self.say(f"clean: {code} {kept:.2f} MB ({', '.join(record['bytes_by_family'])}); {dropped}")
        for family, reason in corpus.missing[code].items():
            self.say(f"missing: {code} has no {family}: {reason}")
        if warning := unlike_shares(sizes, self.settings.shares):
            self.say(f"warning: {code}: {warning}")
        return record

    def _refuse_empty(self, code: str, sizes: Mapping[str, int], capped: Counter[str]) -> None:
        empty = next((split for split, size in sizes.items() if not size), None)
        if empty is not None and capped[empty]:
            raise UserError(
                f"--max-mb-per-language ({self.settings.max_mb_per_language:g}) leaves nothing of {code} for {empty}: "
                f"it leaves out {capped[empty]} lines there, in whole documents; raise it, or give shorter documents"
            )
        if empty == "train":
            others = ", ".join(other for other, size in sizes.items() if size)
            where = f", all of its text is held out ({others})" if others else ""
            raise UserError(
                f"--langs {code}: its training part is empty after cleaning{where}; documents are never divided "
                "between parts, and end at an empty line unless --document-separator says otherwise (line, where "
                "every line is one)"
            )
        if empty is not None:
            raise UserError(
                f"--{empty}-fraction {self.settings.shares[empty]:g}: no document of {code} is held out for {empty}; "
                f"give more (or shorter) documents, a larger fraction, or 0 for no {empty} part"
            )

    def _spot_check(self) -> dict[str, Any]:
        checks = {}
        for code in self.settings.languages:
            checks[code] = spot_check(self._text(code), LANGUAGES[code], self.settings.seed)
            self.say(
                "spot check: {code} {lines} random lines, {foreign_script_lines} with a letter of a foreign script, "
                "{misfit_lines} mostly of one; letters {scripts}".format(code=code, **checks[code])
            )
        write_json(self.partial / _SPOT_CHECK, checks)
        return checks

    def _align(self) -> dict[str, Any]:
        """Returns counts by part and language; empty when nothing is aligned."""
        aligned = {}
        for split in self.settings.splits[1:]:
            files = {code: self.partial / "held-out" / code / f"{split}.jsonl" for code in self.settings.languages}
            aligned[split] = write_aligned(files, self.partial / "aligned" / f"{split}.jsonl")
        self.say(f"aligned: {', '.join(f'{split} {counts}' for split, counts in aligned.items())}")
        return aligned if any(aligned.values()) else {}

    def _train_vocabulary(self) -> None:
        settings = self.settings
        texts = {code: self._text(code) for code in settings.languages}
        sizes = {code: count_text(text) for code, text in texts.items()}
        characters = {code: size.characters for code, size in sizes.items()}
        shares = language_shares(characters, settings.vocab_sampling_alpha)
        num_lines = sum(size.lines for size in sizes.values())
        budget = sum(characters.values()) * min(1.0, settings.tokenizer_lines / num_lines)
        rates = {code: shares[code] * budget / characters[code] for code in texts}
        expected = round(sum(rates[code] * sizes[code].lines for code in texts))
        self.train_vocabulary(
            sample_lines(texts, rates, settings.seed), expected, f"about {expected} lines of the training parts",
            remark="; shares " + ", ".join(f"{code} {share:.3f}" for code, share in shares.items()),
        )  # fmt: skip

    def _binaries(self, code: str) -> list[str]:
        return [f"{code}/{split}.{kind}" for split in self.settings.splits for kind in ("bin", "idx")]

    def _binarise_language(self, code: str) -> dict[str, dict[str, Any]]:
        recorded = {}
        for split in self.settings.splits:
            counts, occurrences = binarize(self._text(code, split), self.partial / code / split, self.vocabulary)
            recorded[split] = counts.as_dict()
            recorded[split]["chars"] = recorded[split].pop("characters")  # the name in manifests of this kind
            if split == "train":
                with atomic_open(self.partial / "occurrences" / f"{code}.npy") as stream:
                    np.save(stream, occurrences)
        parts = (
            f"{split} {part['documents']} documents, {part['lines']} lines, {part['bytes'] / 1e6:.2f} MB, "
            f"{part['tokens']} tokens"
            for split, part in recorded.items()
        )
        self.say(f"binarise: {code} {'; '.join(parts)}")
        return recorded

    def _make_dictionary(self) -> None:
        occurrences = [np.load(self.partial / "occurrences" / f"{code}.npy") for code in self.settings.languages]
        self.save_dictionary(np.sum(occurrences, axis=0))


def language_shares(sizes: Mapping[str, int], alpha: float) -> dict[str, float]:
    """Returns ``(n_l / N) ** alpha``, normalised to 1: XLM's sampling of languages."""
    total = sum(sizes.values())
    weights = {code: (size / total) ** alpha for code, size in sizes.items()}
    return {code: weight / sum(weights.values()) for code, weight in weights.items()}


def sample_lines(texts: Mapping[str, Path], rates: Mapping[str, float], seed: int) -> Iterator[str]:
    """Yields every line of a language ``rate`` times on average: its whole part always, the rest by chance."""
    for code, text in texts.items():
        generator = random.Random(f"{seed} {code}")
        whole, rest = divmod(rates[code], 1)
        for line in iter_lines(text):
            for _ in range(int(whole) + (generator.random() < rest)):
                yield line


def write_aligned(files: Mapping[str, Path], target: Path) -> dict[str, int]:
    """Writes ``{"key": ..., "text": {"de": ...}}`` for each key of several languages; returns counts of both."""
    texts: dict[str, dict[str, str]] = {}
    for code, file in files.items():
        for passage in read_passages(file):
            texts.setdefault(str(passage.key), {}).setdefault(code, " ".join(passage.lines))
    counts: Counter[str] = Counter()
    with atomic_open(target) as stream:
        for key in sorted(texts):
            if len(texts[key]) > 1:
                counts.update(["keys", *texts[key]])
                stream.write(json_line({"key": key, "text": texts[key]}))
    return dict(counts)
