"""English text: cleaned, split by document, with a vocabulary learnt on the training part, binarised."""

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable

from tqdm import tqdm

from ..common.files import atomic_open
from ..data.documents import Cleaner, Document
from .base import MODEL_FILE, Preparation, TextSettings, binary_files
from .binarize import iter_lines
from .splits import SPLITS, DocumentSize, assign_splits, unlike_shares

_CORPUS, _SIZES = "corpus.txt", "corpus.sizes"


@dataclass(frozen=True, kw_only=True)
class EnglishSettings(TextSettings):
    """How English text is prepared; for ``dedup`` see :class:`~mhmoe_fairseq.data.documents.Cleaner`."""

    tokenizer: str = "sentencepiece"
    dedup: str = "lines"


class EnglishPreparation(Preparation[EnglishSettings]):
    """Prepares a :class:`~.sources.base.Source`."""

    kind = "english"

    def identity(self) -> dict[str, Any]:
        """Returns the settings by flag that decide the prepared data, the source's own among them."""
        source = {"name": self.source.name, **self.source.identity()}
        return {"source": source, **self.source.options, **self.settings.identity()}

    def make(self) -> dict[str, Any]:
        """Runs the stages that are not done yet and publishes the result; returns the manifest."""
        provenance, cleaning = self.stage("corpus", [_CORPUS, _SIZES], self._make_corpus)
        splits = self.stage("split", [f"text/{split}.txt" for split in SPLITS], self._split)
        outputs = [f"text/{split}.txt" for split in splits]
        if self.settings.tokenizer == "sentencepiece":
            self.stage("vocabulary", [MODEL_FILE], self._train_vocabulary)
            outputs.append(MODEL_FILE)
        source = {"name": self.source.name, "licence": self.source.licence, "unit": self.source.unit, **provenance}
        entries = {
            "source": source,
            "cleaning": cleaning,
            "tokenizer": self.vocabulary.describe(),
            "splits": {split: self.binarise(split) for split in splits},
        }
        return self.publish(entries, [*outputs, *(name for split in splits for name in binary_files(split))])

    def _make_corpus(self) -> tuple[dict[str, object], dict[str, int]]:
        start = time.monotonic()
        provenance, documents = self.source.open(self.cache_dir, self.say)
        cleaner = Cleaner(self.settings.dedup)
        text, sizes, counts = self.partial / _CORPUS, self.partial / _SIZES, cleaner.counts
        num_documents, num_bytes = write_corpus(cleaner.clean(documents), text, sizes)
        self.say(
            f"clean: {num_documents} documents, {num_bytes / 1e6:.2f} MB, {counts['lines_read']} lines read, "
            f"{counts['empty_lines'] + counts['duplicate_lines']} empty or repeated ones dropped, "
            f"{time.monotonic() - start:.1f} s"
        )
        return provenance, {**counts, "documents": num_documents, "bytes": num_bytes}

    def _split(self) -> list[str]:
        sizes, settings = read_sizes(self.partial / _SIZES), self.settings
        assigned = assign_splits(sizes, settings.shares, settings.seed)
        present = [split for split in SPLITS if split in assigned]
        targets = {split: self.partial / "text" / f"{split}.txt" for split in present}
        write_splits(self.partial / _CORPUS, sizes, assigned, targets)
        prescribed = any(size.split for size in sizes)
        counts = ", ".join(f"{split} {assigned.count(split)}" for split in present)
        self.say(f"split: {counts} documents ({'as the source has them' if prescribed else f'seed {settings.seed}'})")
        filled = dict.fromkeys(present, 0)
        for size, split in zip(sizes, assigned):
            filled[split] += size.num_bytes
        if not prescribed and (warning := unlike_shares(filled, settings.shares)):
            self.say(f"warning: {warning}")
        return present

    def _train_vocabulary(self) -> None:
        text, max_lines = self.partial / "text" / "train.txt", self.settings.tokenizer_lines
        num_lines = sum(1 for _ in iter_lines(text))
        self.train_vocabulary(iter_lines(text), num_lines, "the training part", max_lines=max_lines)


def write_corpus(documents: Iterable[Document], text: Path, sizes: Path) -> tuple[int, int]:
    """Writes all documents to ``text``, ``BYTES SPLIT`` of each to ``sizes``; returns how many documents and bytes."""
    num_documents = num_bytes = 0
    with atomic_open(sizes) as index, atomic_open(text) as stream:
        for document in tqdm(documents, desc="read and clean", unit=" documents", disable=None):
            content = ("\n".join(document.lines) + "\n").encode()
            stream.write(content)
            index.write(f"{len(content)} {document.split or '-'}\n".encode())
            num_documents += 1
            num_bytes += len(content)
    return num_documents, num_bytes


def read_sizes(sizes: Path) -> list[DocumentSize]:
    """Returns what :func:`write_corpus` recorded, in order."""
    rows = (line.split() for line in sizes.read_text(encoding="ascii").splitlines())
    return [DocumentSize(int(num_bytes), None if split == "-" else split) for num_bytes, split in rows]


def write_splits(text: Path, sizes: list[DocumentSize], assigned: list[str], targets: dict[str, Path]) -> None:
    """Copies every document to its split's file, in corpus order, with an empty line between two documents."""
    with contextlib.ExitStack() as stack:
        outputs = {split: stack.enter_context(atomic_open(target)) for split, target in targets.items()}
        stream = stack.enter_context(open(text, "rb"))
        for size, split in zip(sizes, assigned):
            outputs[split].write((b"\n" if outputs[split].tell() else b"") + stream.read(size.num_bytes))
