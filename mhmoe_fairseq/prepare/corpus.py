"""The cleaned corpus between two stages: a text file, and beside it the size of every document in it."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Iterable, Iterator

from tqdm import tqdm

from ..common.files import atomic_open
from ..data.documents import Document
from .splits import DocumentSize


def write_corpus(documents: Iterable[Document], text: Path, sizes: Path) -> tuple[int, int]:
    """Writes the documents one after the other to ``text``, and ``BYTES SPLIT`` per document to ``sizes``.

    Returns:
        number of documents and of bytes.
    """
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
    """What :func:`write_corpus` recorded, in order."""
    rows = (line.split() for line in sizes.read_text(encoding="ascii").splitlines())
    return [DocumentSize(int(num_bytes), None if split == "-" else split) for num_bytes, split in rows]


def write_splits(text: Path, sizes: list[DocumentSize], assigned: list[str], targets: dict[str, Path]) -> None:
    """Copies every document to its split's file, in corpus order, with an empty line between two documents."""
    for split, target in targets.items():
        with open(text, "rb") as stream, atomic_open(target) as output:
            _copy(stream, output, [(size.num_bytes, name == split) for size, name in zip(sizes, assigned)])


def _copy(stream: IO[bytes], output: IO[bytes], documents: list[tuple[int, bool]]) -> None:
    first = True
    for num_bytes, wanted in documents:
        if not wanted:
            stream.seek(num_bytes, 1)
            continue
        output.write(b"" if first else b"\n")
        output.write(stream.read(num_bytes))
        first = False


def iter_lines(text: Path) -> Iterator[str]:
    """The non-empty lines of a split's file."""
    with open(text, encoding="utf-8", newline="\n") as stream:
        for line in stream:
            if line != "\n":
                yield line.rstrip("\n")
