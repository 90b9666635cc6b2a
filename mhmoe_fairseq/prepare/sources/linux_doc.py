"""The kernel's documentation out of a Debian package: one document per file, one line per paragraph of prose."""

from pathlib import Path
from typing import Iterator

from ...common.arguments import nonempty
from ...data.documents import Document
from ..archives import Archive, iter_deb_members
from .base import ENGLISH_SOURCES, PackagedSource, SourceKind
from .prose import prose_lines

_ROOT = "/Documentation/"


def linux_documents(path: Path) -> Iterator[Document]:
    """Yields the English ``.rst`` and ``.txt`` files under ``Documentation`` of the package at ``path``.

    Raises:
        UserError: the package or a file in it is damaged.
    """
    for name, content in iter_deb_members(path, _is_wanted):
        yield Document(name.split(_ROOT, 1)[1], prose_lines(content.decode("utf-8", "replace")))


def _is_wanted(name: str) -> bool:
    _, root, relative = name.removesuffix(".gz").partition(_ROOT)
    return bool(root) and relative.endswith((".rst", ".txt")) and not relative.startswith("translations/")


def linux_doc(package: str) -> PackagedSource:
    """Returns the kernel's documentation as Debian packages it (``linux-doc-6.1`` on Debian 12); its version moves."""
    return PackagedSource(
        name="linux-doc",
        licence="GPL-2 (mostly; see the package's copyright file)",
        unit="document = documentation file, line = paragraph",
        archive=Archive("apt-get", package, None, f"{package}_*.deb"),
        read=linux_documents,
    )


_NAME = {"type": nonempty, "default": "linux-doc-6.1", "metavar": "NAME", "help": "for linux-doc: its name here"}
ENGLISH_SOURCES["linux-doc"] = SourceKind(lambda args: linux_doc(args.deb_package), flags={"--deb-package": _NAME})
