"""The kernel's documentation out of a Debian package: one document per file, one line per paragraph of prose."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Iterator

from ...common.errors import UserError
from ...data.documents import Document
from ..archives import iter_tar_members, read_deb_data
from .prose import is_prose, paragraphs

_SUFFIXES = (".rst", ".txt")


def linux_documents(path: Path) -> Iterator[Document]:
    """Yields the English ``.rst`` and ``.txt`` files under ``Documentation`` of the package at ``path``.

    Raises:
        UserError: the package is damaged, or a file in it is not gzip although it is named so.
    """
    for name, content in iter_tar_members(path, "*/Documentation/*", read_deb_data(path)):
        plain = name.removesuffix(".gz")
        relative = plain.split("/Documentation/", 1)[1]
        if not plain.endswith(_SUFFIXES) or relative.startswith("translations/"):
            continue
        if name.endswith(".gz"):
            try:
                content = gzip.decompress(content)
            except (OSError, EOFError) as error:
                raise UserError(f"{path}: damaged member {name} ({error}); delete it and run again") from error
        lines = [paragraph for paragraph in paragraphs(content.decode("utf-8", "replace")) if is_prose(paragraph)]
        yield Document(relative, lines)
