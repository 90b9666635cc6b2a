"""English text: cleaned, split by document, with a vocabulary learnt on the training part, binarised."""

import contextlib
import itertools
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Sequence

from tqdm import tqdm

from ..common.files import atomic_open
from ..data.documents import Cleaner, Document
from ..data.domains import FILE as DOMAINS
from ..data.domains import write_domains
from .base import CorpusPreparation, TextSettings, binary_files
from .binarize import iter_lines
from .splits import SPLITS, DocumentSize, assign_splits, unlike_shares

_CORPUS, _SIZES = "corpus.txt", "corpus.sizes"


@dataclass(frozen=True, kw_only=True)
class EnglishSettings(TextSettings):
    """How English text is prepared; for ``dedup`` see :class:`~mhmoe_fairseq.data.documents.Cleaner`."""

    tokenizer: str = "sentencepiece"
    dedup: str = "lines"


class EnglishPreparation(CorpusPreparation[EnglishSettings]):
    """Prepares a :class:`~.sources.base.Source`."""

    kind = "english"

    def identity(self) -> dict[str, Any]:
        """Returns the settings by flag that decide the prepared data, the source's own among them."""
        source = {"name": self.source.name, **self.source.identity()}
        return {"source": source, **self.source.options, **self.settings.identity()}

    def now_available(self, manifest: dict[str, Any]) -> list[str]:
        """Returns what the source could not fetch then and can now."""
        return self.source.now_available(manifest["source"], self.downloads)

    def make(self) -> dict[str, Any]:
        """Runs the stages that are not done yet and publishes the result; returns the manifest."""
        provenance, cleaning = self.stage("corpus", [_CORPUS, _SIZES], self._make_corpus)
        splits = self.stage("split", [f"text/{split}.txt" for split in SPLITS], self._split)
        outputs = [f"text/{split}.txt" for split in splits]
        outputs.append(self.make_vocabulary(self._train_vocabulary))
        if any(size.domain for size in read_sizes(self.partial / _SIZES)):
            self.stage("domains", [DOMAINS], self._name_domains)
            outputs.append(DOMAINS)
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
        provenance, documents = self.source.open(self.downloads, self.say)
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
        """Divides the corpus; of several domains each held-out part is there for itself, too, as ``valid_DOMAIN``."""
        sizes, assigned, order = self._arrange()
        settings = self.settings
        parts = [
            (split,) if split == "train" or size.domain is None else (split, f"{split}_{size.domain}")
            for size, split in zip(sizes, assigned)
        ]
        present = sorted(set(itertools.chain(*parts)), key=lambda name: (SPLITS.index(name.split("_")[0]), name))
        targets = {split: self.partial / "text" / f"{split}.txt" for split in present}
        write_splits(self.partial / _CORPUS, sizes, parts, targets, order)
        prescribed = any(size.split for size in sizes)
        counts = ", ".join(f"{split} {assigned.count(split)}" for split in SPLITS if split in assigned)
        self.say(f"split: {counts} documents ({'as the source has them' if prescribed else f'seed {settings.seed}'})")
        filled = dict.fromkeys(filter(assigned.__contains__, SPLITS), 0)
        for size, split in zip(sizes, assigned):
            filled[split] += size.num_bytes
        if not prescribed and (warning := unlike_shares(filled, settings.shares)):
            self.say(f"warning: {warning}")
        return present

    def _arrange(self) -> tuple[list[DocumentSize], list[str], list[int]]:
        """Returns the documents, the split of each, and the order in which splits have them."""
        sizes, seed = read_sizes(self.partial / _SIZES), self.settings.seed
        assigned = assign_splits(sizes, self.settings.shares, seed)
        order = list(range(len(sizes)))
        if any(size.domain for size in sizes):  # a training must not see one domain after the other
            random.Random(seed).shuffle(order)
            order = [*filter(lambda index: assigned[index] == "train", order)]
            order += [index for index, split in enumerate(assigned) if split != "train"]
        return sizes, assigned, order

    def _name_domains(self) -> None:
        sizes, assigned, order = self._arrange()
        documents: dict[str, list[str]] = {split: [] for split in SPLITS if split in assigned}
        for index in order:
            documents[assigned[index]].append(str(sizes[index].domain))
        write_domains(self.partial / DOMAINS, documents)

    def _train_vocabulary(self) -> None:
        text, max_lines = self.partial / "text" / "train.txt", self.settings.tokenizer_lines
        num_lines = sum(1 for _ in iter_lines(text))
        self.train_vocabulary(iter_lines(text), num_lines, "the training part", max_lines=max_lines)


def write_corpus(documents: Iterable[Document], text: Path, sizes: Path) -> tuple[int, int]:
    """Writes documents to ``text``, ``BYTES SPLIT DOMAIN`` of each to ``sizes``; returns how many, and their bytes."""
    num_documents = num_bytes = 0
    with atomic_open(sizes) as index, atomic_open(text) as stream:
        for document in tqdm(documents, desc="read and clean", unit=" documents", disable=None):
            content = ("\n".join(document.lines) + "\n").encode()
            stream.write(content)
            index.write(f"{len(content)} {document.split or '-'} {document.domain or '-'}\n".encode())
            num_documents += 1
            num_bytes += len(content)
    return num_documents, num_bytes


def read_sizes(sizes: Path) -> list[DocumentSize]:
    """Returns what :func:`write_corpus` recorded, in order."""
    rows = (line.split() for line in sizes.read_text(encoding="ascii").splitlines())
    return [
        DocumentSize(int(num_bytes), *(None if name == "-" else name for name in names)) for num_bytes, *names in rows
    ]


def write_splits(
    text: Path,
    sizes: list[DocumentSize],
    parts: Sequence[Sequence[str]],
    targets: dict[str, Path],
    order: Sequence[int],
) -> None:
    """Copies every document, in ``order``, to the files of its parts, with an empty line between two documents."""
    starts = [0, *itertools.accumulate(size.num_bytes for size in sizes)]
    with contextlib.ExitStack() as stack:
        outputs = {split: stack.enter_context(atomic_open(target)) for split, target in targets.items()}
        stream = stack.enter_context(open(text, "rb"))
        for index in order:
            stream.seek(starts[index])
            content = stream.read(sizes[index].num_bytes)
            for output in map(outputs.__getitem__, parts[index]):
                output.write((b"\n" if output.tell() else b"") + content)
