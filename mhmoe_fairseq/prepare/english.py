"""From a source to a prepared folder: clean, split by document, learn a vocabulary on the training part, binarise."""

from __future__ import annotations

import datetime
import platform
import time
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Optional

from ..data.documents import Cleaner
from ..data.sentencepiece_vocabulary import SentencePieceVocabulary, train_sentencepiece
from ..data.tiktoken_vocabulary import TiktokenDictionaryVocabulary
from ..data.vocabulary import Vocabulary, build_dictionary, save_dictionary
from .archives import Say
from .binarize import binarize
from .corpus import iter_lines, read_sizes, write_corpus, write_splits
from .sources import Source
from .splits import SPLITS, assign_splits, unlike_shares
from .workspace import Workspace, prepare_folder

MODEL_FILE = "sentencepiece.model"
_CORPUS, _SIZES = "corpus.txt", "corpus.sizes"
_TOOLS = ("mhmoe_fairseq", "fairseq", "fairseq-fixed", "sentencepiece", "tiktoken", "numpy", "torch")


@dataclass(frozen=True)
class PrepareSettings:
    """How a corpus is prepared; every field is part of the manifest's settings."""

    vocab_size: int = 8000
    tokenizer: str = "sentencepiece"
    tokenizer_model: str = "unigram"
    tokenizer_lines: int = 2_000_000
    tiktoken_ranks: Optional[Path] = None
    dedup: str = "lines"
    valid_fraction: float = 0.05
    test_fraction: float = 0.05
    seed: int = 1


class Preparation:
    """One run over the stages of one workspace."""

    def __init__(self, source: Source, settings: PrepareSettings, workspace: Workspace, cache_dir: Path, say: Say):
        self._source = source
        self._settings = settings
        self._workspace = workspace
        self._cache_dir = cache_dir
        self._say = say
        self._partial = workspace.partial

    def run(self) -> dict[str, Any]:
        """Runs the stages that are not done yet and publishes the result; returns the manifest."""
        provenance, cleaning = self._workspace.stage("corpus", [_CORPUS, _SIZES], self._make_corpus)
        splits = self._workspace.stage("split", [f"text/{split}.txt" for split in SPLITS], self._split)
        outputs = [f"text/{split}.txt" for split in splits]
        if self._settings.tokenizer == "sentencepiece":
            self._workspace.stage("vocabulary", [MODEL_FILE], self._train_vocabulary)
            outputs.append(MODEL_FILE)
        vocabulary = load_vocabulary(self._partial, self._settings.tiktoken_ranks)
        counts = {}
        for split in splits:
            files = [f"{split}.bin", f"{split}.idx"] + (["dict.txt"] if split == "train" else [])
            counts[split] = self._workspace.stage(
                f"binarise {split}", files, partial(self._binarise, split, vocabulary)
            )
            outputs += files
        manifest = {
            "format": 1,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "source": {
                "name": self._source.name,
                "licence": self._source.licence,
                "unit": self._source.unit,
                **provenance,
            },
            "cleaning": cleaning,
            "tokenizer": vocabulary.describe(),
            "splits": counts,
            "tools": tool_versions(),
        }
        return self._workspace.publish(manifest, outputs)

    def _make_corpus(self) -> tuple[dict[str, object], dict[str, int]]:
        start = time.monotonic()
        opened = self._source.open(self._cache_dir, self._say)
        cleaner = Cleaner(self._settings.dedup)
        documents = cleaner.clean(opened.documents)
        num_documents, num_bytes = write_corpus(documents, self._partial / _CORPUS, self._partial / _SIZES)
        dropped = {name: count for name, count in cleaner.counts.items() if name != "lines_read"}
        self._say(
            f"clean: {num_documents} documents, {num_bytes / 1e6:.2f} MB, {cleaner.counts['lines_read']} lines read, "
            f"{sum(dropped.values()) - dropped['empty_or_duplicate_documents']} empty or repeated ones dropped, "
            f"{time.monotonic() - start:.1f} s"
        )
        return opened.provenance, {**cleaner.counts, "documents": num_documents, "bytes": num_bytes}

    def _split(self) -> list[str]:
        sizes = read_sizes(self._partial / _SIZES)
        settings = self._settings
        assigned = assign_splits(
            sizes, valid_fraction=settings.valid_fraction, test_fraction=settings.test_fraction, seed=settings.seed
        )
        present = [split for split in SPLITS if split in assigned]
        targets = {split: self._partial / "text" / f"{split}.txt" for split in present}
        write_splits(self._partial / _CORPUS, sizes, assigned, targets)
        shares = ", ".join(f"{split} {assigned.count(split)}" for split in present)
        rule = "as the source has them" if any(size.split for size in sizes) else f"seed {settings.seed}"
        self._say(f"split: {shares} documents ({rule})")
        if not any(size.split for size in sizes):
            filled = {split: sum(size.num_bytes for size, part in zip(sizes, assigned) if part == split)
                      for split in present}  # fmt: skip
            self._warn_of_shares(filled)
        return present

    def _warn_of_shares(self, filled: dict[str, int]) -> None:
        settings = self._settings
        warning = unlike_shares(
            filled, valid_fraction=settings.valid_fraction, test_fraction=settings.test_fraction
        )
        if warning is not None:
            self._say(f"warning: {warning}")

    def _train_vocabulary(self) -> None:
        start = time.monotonic()
        text = self._partial / "text" / "train.txt"
        settings = self._settings
        train_sentencepiece(
            iter_lines(text),
            sum(1 for _ in iter_lines(text)),
            self._partial / MODEL_FILE,
            vocab_size=settings.vocab_size,
            model=settings.tokenizer_model,
            max_lines=settings.tokenizer_lines,
            seed=settings.seed,
        )
        self._say(
            f"vocabulary: SentencePiece {settings.tokenizer_model}, {settings.vocab_size} pieces with byte fallback, "
            f"learnt on the training part, {time.monotonic() - start:.1f} s"
        )

    def _binarise(self, split: str, vocabulary: Vocabulary) -> dict[str, float]:
        start = time.monotonic()
        counts, occurrences = binarize(self._partial / "text" / f"{split}.txt", self._partial / split, vocabulary)
        if split == "train":
            save_dictionary(build_dictionary(vocabulary.symbols, occurrences), self._partial / "dict.txt")
        recorded = counts.as_dict()
        self._say(
            f"{split}: {counts.documents} documents, {counts.lines} lines, {counts.words} words, "
            f"{counts.bytes / 1e6:.2f} MB, {counts.tokens} tokens, {recorded['bytes_per_token']:.2f} bytes a token, "
            f"{time.monotonic() - start:.1f} s"
        )
        return recorded


def prepare(
    source: Source,
    settings: PrepareSettings,
    dest: Path,
    *,
    cache_dir: Path,
    overwrite: bool,
    identity: dict[str, Any],
    say: Say,
) -> dict[str, Any]:
    """Prepares ``source`` into ``dest`` and returns the manifest; does nothing if that was done before.

    Args:
        identity: the settings by flag name that decide whether an earlier preparation is the same one.

    Raises:
        UserError: other settings already in ``dest``, bad input, no room, a client that is missing or fails.
    """
    return prepare_folder(
        dest, identity, lambda workspace: Preparation(source, settings, workspace, cache_dir, say).run(),
        overwrite=overwrite, say=say,
    )  # fmt: skip


def load_vocabulary(folder: Path, tiktoken_ranks: Optional[Path]) -> Vocabulary:
    """The rank file's vocabulary, or that of the SentencePiece model in ``folder`` without one."""
    if tiktoken_ranks is not None:
        return TiktokenDictionaryVocabulary(tiktoken_ranks)
    return SentencePieceVocabulary(folder / MODEL_FILE)


def tool_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that have a say in the data."""
    versions = {"python": platform.python_version()}
    for tool in _TOOLS:
        try:
            versions[tool] = metadata.version(tool)
        except metadata.PackageNotFoundError:
            continue
    return versions
