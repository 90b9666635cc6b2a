"""What all preparations have in common: settings, resumable stages, a vocabulary, binarised text and a manifest."""

import argparse
import shutil
import time
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Callable, ClassVar, Generic, Iterable, Optional, TypeVar

import numpy as np

from ..common.errors import UserError
from ..common.files import sha256_of
from ..common.locks import LOCK, exclusive_lock
from ..common.provenance import timestamp, versions
from ..data.identity import read_manifest
from ..data.vocabularies import (
    MODEL_FILE,
    RANKS_FILE,
    Vocabulary,
    find_vocabulary,
    read_vocabulary,
    train_sentencepiece,
    write_dictionary,
)
from .archives import Say
from .binarize import binarize
from .workspace import Workspace

DICTIONARY = "dict.txt"
_TOOLS = ("mhmoe_fairseq", "fairseq", "fairseq-fixed", "sentencepiece", "tiktoken", "numpy", "torch")
_OF_SENTENCEPIECE = ("vocab_size", "vocab_sampling_alpha", "tokenizer_model", "tokenizer_lines")


@dataclass(frozen=True)
class Settings:
    """How something is prepared; every field is part of the manifest's settings."""

    @classmethod
    def from_flags(cls, flags: argparse.Namespace, **others: Any) -> Any:
        """Returns the settings; a field that is not among ``others`` is the flag of its name."""
        named = {field.name: getattr(flags, field.name) for field in fields(cls) if field.name not in others}
        return cls(**named, **others)

    def identity(self) -> dict[str, Any]:
        """Returns the settings by flag; two preparations with equal ones make equal data."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class CorpusSettings(Settings):
    """The settings of preparations that learn a vocabulary and hold out parts; ``UserError`` if they hold out all."""

    vocab_size: int = 8000
    tokenizer_model: str = "unigram"
    valid_fraction: float = 0.05
    test_fraction: float = 0.05
    seed: int = 1

    def __post_init__(self) -> None:
        if not all(0 < share <= 1 for share in (self.shares["train"], 1 - self.valid_fraction, 1 - self.test_fraction)):
            flags = f"--valid-fraction {self.valid_fraction:g} and --test-fraction {self.test_fraction:g}"
            raise UserError(f"{flags}: their sum must be below 1, the rest is the training part, and none negative")

    @property
    def shares(self) -> dict[str, float]:
        """The share of each part."""
        held_out = self.valid_fraction + self.test_fraction
        return {"train": 1 - held_out, "valid": self.valid_fraction, "test": self.test_fraction}

    @property
    def splits(self) -> list[str]:
        """The parts that have a share."""
        return [split for split, share in self.shares.items() if share > 0]


@dataclass(frozen=True, kw_only=True)
class TextSettings(CorpusSettings):
    """The settings of preparations of text; with ``tiktoken_ranks`` SentencePiece's have no meaning."""

    tokenizer_lines: int = 2_000_000
    tiktoken_ranks: Optional[Path] = None

    def identity(self) -> dict[str, Any]:
        """Returns the settings by flag, a rank file as its hash, without those that have no meaning."""
        identity = super().identity()
        ranks = identity.pop("tiktoken_ranks")
        if ranks is None:
            return identity
        kept = {name: value for name, value in identity.items() if name not in _OF_SENTENCEPIECE}
        return {**kept, "tiktoken_ranks": sha256_of(ranks)}


SomeSettings = TypeVar("SomeSettings", bound=Settings)
SomeCorpusSettings = TypeVar("SomeCorpusSettings", bound=CorpusSettings)


@dataclass(eq=False)
class Preparation(ABC, Generic[SomeSettings]):
    """One preparation of a folder: of a source, as the settings say, with downloads in ``cache_dir``.

    Attributes:
        downloads: ``cache_dir``, or a folder beside the prepared one.
        partial: folder in which everything is made.
        stage: see :meth:`~.workspace.Workspace.stage`.
    """

    kind: ClassVar[str]
    source: Any
    settings: SomeSettings
    cache_dir: Optional[Path]
    say: Say
    downloads: Path = field(init=False)
    workspace: Workspace = field(init=False)
    partial: Path = field(init=False)
    stage: Callable[[str, list[str], Callable[[], Any]], Any] = field(init=False)

    def identity(self) -> dict[str, Any]:
        """Returns the settings by flag that decide whether an earlier preparation is the same one."""
        return {"source": {"name": self.source.name, **self.source_identity()}, **self.settings.identity()}

    def source_identity(self) -> dict[str, Any]:
        """Returns what tells the source's content from another."""
        return self.source.identity()

    def now_available(self, manifest: dict[str, Any]) -> list[str]:
        """Returns what an earlier preparation with this manifest lacks and can be had now: most lack nothing."""
        return []

    def _require_up_to_date(self, manifest: dict[str, Any]) -> None:
        if now := self.now_available(manifest):
            raise UserError(
                f"--dest {self.workspace.dest}: was prepared without {', '.join(now)}, which can be fetched now, and "
                "would be other data: choose another --dest, or add --overwrite to replace it"
            )

    @abstractmethod
    def make(self) -> dict[str, Any]:
        """Runs the stages that are not done yet and publishes the result; returns the manifest."""

    def run(self, dest: Path, *, overwrite: bool = False) -> dict[str, Any]:
        """Prepares ``dest`` and returns the manifest; does nothing if that was done before with equal settings.

        Raises:
            UserError: ``dest`` has other settings, lacks what can be had now, or is held by another run; bad input, no
                room, a client that fails.
        """
        self.workspace = Workspace(dest, self.identity())
        self.partial, self.stage = self.workspace.partial, self.workspace.stage
        self.downloads = self.cache_dir or dest.absolute().parent / ".mhmoe-downloads"
        with exclusive_lock(dest / LOCK, "--dest"):
            state = self.workspace.begin(overwrite=overwrite, say=self.say)
            if state == "complete":
                self._require_up_to_date(read_manifest(dest))
                self.say(f"{dest}: already prepared with these settings, nothing to do")
                return read_manifest(dest)
            if state == "resumed":
                self.say(f"{dest}: continuing an unfinished preparation")
            manifest = self.make()
        self.say(f"done: {dest}, {sum(entry['bytes'] for entry in manifest['files'].values()) / 1e6:.1f} MB")
        return manifest

    def publish(self, entries: dict[str, Any], outputs: list[str]) -> dict[str, Any]:
        """Moves the outputs into place, with a manifest of ``entries`` and what every manifest has; returns it."""
        return self.workspace.publish(complete_manifest(self.kind, entries), outputs)


class CorpusPreparation(Preparation[SomeCorpusSettings]):
    """One that learns a vocabulary and binarises text.

    Attributes:
        dictionary_multiple: of what the dictionary's size is a multiple.
    """

    dictionary_multiple: ClassVar[int] = 8

    @property
    def extra_symbols(self) -> tuple[str, ...]:
        """Symbols of the dictionary besides the vocabulary's."""
        return ()

    def make_vocabulary(self, learn: Callable[[], None]) -> str:
        """Makes the vocabulary's file in a stage: ``learn`` writes SentencePiece's, a rank file is copied.

        Returns:
            the file's name, one of the outputs.
        """
        ranks: Optional[Path] = getattr(self.settings, "tiktoken_ranks", None)
        name = MODEL_FILE if ranks is None else RANKS_FILE

        def copy() -> None:
            assert ranks is not None
            shutil.copyfile(ranks, self.partial / name)

        self.stage("vocabulary", [name], learn if ranks is None else copy)
        return name

    def publish(self, entries: dict[str, Any], outputs: list[str]) -> dict[str, Any]:
        """As in every preparation; a vocabulary of other data, which somebody put there, does not stay beside it."""
        manifest = super().publish(entries, outputs)
        for name in {MODEL_FILE, RANKS_FILE}.difference(outputs):
            (self.workspace.dest / name).unlink(missing_ok=True)
        return manifest

    def train_vocabulary(
        self, lines: Iterable[str], num_lines: int, learnt_on: str, *, max_lines: Optional[int] = None, remark: str = ""
    ) -> None:
        """Trains SentencePiece on ``lines``, at most about ``max_lines`` of them.

        Args:
            learnt_on, remark: what is said of the lines.
        """
        start, settings = time.monotonic(), self.settings
        train_sentencepiece(
            lines, num_lines, self.partial / MODEL_FILE, vocab_size=settings.vocab_size,
            model=settings.tokenizer_model, max_lines=max_lines or num_lines, seed=settings.seed,
        )  # fmt: skip
        self.say(
            f"vocabulary: SentencePiece {settings.tokenizer_model}, {settings.vocab_size} pieces with byte fallback, "
            f"learnt on {learnt_on}, {time.monotonic() - start:.1f} s{remark}"
        )

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """That of the file which ``make_vocabulary`` has made."""
        path = find_vocabulary(self.partial)
        assert path is not None, "the vocabulary is made before text is binarised"
        return read_vocabulary(path)

    def binarise(self, split: str, folder: str = "") -> dict[str, float]:
        """Binarises ``text/SPLIT.txt`` into ``folder`` in a stage, the dictionary with train; returns its counts."""
        return self.stage(f"binarise {split}", binary_files(split, folder), partial(self._binarise, split, folder))

    def _binarise(self, split: str, folder: str) -> dict[str, float]:
        start = time.monotonic()
        text = self.partial / "text" / f"{split}.txt"
        counts, occurrences = binarize(text, self.partial / f"{folder}{split}", self.vocabulary)
        if split == "train":
            self.save_dictionary(occurrences)
        recorded = counts.as_dict()
        self.say(
            f"{split}: {counts.documents} documents, {counts.lines} lines, {counts.words} words, "
            f"{counts.bytes / 1e6:.2f} MB, {counts.tokens} tokens, {recorded['bytes_per_token']:.2f} bytes a token, "
            f"{time.monotonic() - start:.1f} s"
        )
        return recorded

    def save_dictionary(self, occurrences: np.ndarray) -> None:
        """Writes ``dict.txt`` from the occurrences of every dictionary index."""
        path, symbols = self.partial / DICTIONARY, self.vocabulary.symbols
        write_dictionary(path, symbols, occurrences, self.extra_symbols, self.dictionary_multiple)


def binary_files(split: str, folder: str = "") -> list[str]:
    """Returns the files that binarising a part makes: the dictionary, too, for ``train``."""
    return [f"{folder}{split}.bin", f"{folder}{split}.idx"] + ([DICTIONARY] if split == "train" else [])


def complete_manifest(kind: str, entries: dict[str, Any]) -> dict[str, Any]:
    """Returns ``entries`` between what every manifest begins and ends with."""
    return {"format": 1, "kind": kind, "created": timestamp(), **entries, "tools": versions(_TOOLS)}
